"""From the settings of a run to the shards it reads and the cache it keeps of those that are not local."""

from __future__ import annotations

import os
from pathlib import Path

from megamoe.config.schema import DataConfig
from megamoe.data.cache import ShardCache
from megamoe.data.catalog import DataSet, ShardNames, Source
from megamoe.data.shards import expand_shards
from megamoe.errors import DataError, UserError


def open_data_set(data: DataConfig, index_dir: Path) -> DataSet:
    """The shards of ``data.train``. Lists folders, opens no shard.

    Args:
        data: section ``data`` of the config.
        index_dir: where learnt indexes are kept if ``data.index`` is not set.

    Raises:
        UserError: there are none.
        DataError: one is missing, or named twice.
    """
    if not data.train:
        raise UserError("data.train is empty: name the training shards, for example data.train=shards/{00000..00063}.tar")
    sources = []
    owner: dict[str, str] = {}
    for number, source in enumerate(data.train):
        name = source.name or str(number)
        shards = expand_shards(source.shards)
        if twice := next((shard for shard in shards if owner.setdefault(shard, name) != name), None):
            raise DataError(f"shard {twice}: is in the sources {owner[twice]} and {name} of data.train; name it in one")
        sources.append(Source(name, ShardNames(shards), source.weight))
    return DataSet(sources, data.index or index_dir, data.held_out)


def open_cache(data: DataConfig) -> ShardCache:
    """The node's cache of shards that are not local files."""
    folder = data.cache or Path(os.environ.get("MEGAMOE_CACHE", "~/.cache/megamoe/shards")).expanduser()
    return ShardCache(folder, int(data.cache_gb * 1e9))
