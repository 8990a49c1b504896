"""Shards that are no local files: downloads, retries, and a cache per node."""
