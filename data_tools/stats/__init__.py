"""Describe what is in shards: figures from one pass, and the page that shows them.

``shard_stats`` counts one shard and adds up many, ``sketch`` holds the distribution of a number in bounded memory, and
``stats_page`` writes stats.json and stats.html. The page extends ``megamoe/report/base.html``.
"""
