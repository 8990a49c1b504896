"""Read what `megamoe data build` builds shards from: folders of pictures, tables and lists of URLs.

``detect`` tells which format a path has and cuts it into one chunk per shard: ``folder``, ``text_table`` (CSV, TSV, JSONL,
lists of URLs) or ``parquet``. ``columns`` maps a row of a table to an ``item``: one sample before it is in a shard.
``download`` fetches the pictures of URLs.
"""
