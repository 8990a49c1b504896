"""Shards: their names, where each sample lies in its tar, and its bytes."""
