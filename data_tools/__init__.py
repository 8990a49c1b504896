"""Makes and keeps shards: the verbs of `megamoe data`."""
