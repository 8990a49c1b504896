"""Find shards by name, locate each sample in its tar, and read its bytes.

``expand`` turns what the user wrote into a list of shards, which ``names`` and ``labels`` hold in little memory.
``index`` records where each sample of one shard lies; it reads the tar by ``tar``. ``storage`` reads members from open
files. ``catalog`` combines them: it learns the shards of a data set one by one as training needs them. ``held_out``
splits samples by key, ``sequential`` reads shards front to back, and ``from_config`` opens the data set of a config.
"""
