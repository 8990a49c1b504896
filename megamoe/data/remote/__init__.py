"""Fetch shards that are not local files into a cache that all processes of a node share.

``cache`` keeps shards on the local disk and fetches a missing one by ``download``, which retries and resumes. ``http``,
``object_store`` and ``pipe`` open a shard as a ``stream``, one per kind of source.
"""
