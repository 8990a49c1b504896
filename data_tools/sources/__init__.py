"""What `megamoe data build` makes shards from: folders of pictures, tables, lists of URLs."""
