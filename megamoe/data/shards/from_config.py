"""Open the data set that section ``data`` of a config names, and the node's cache of shards that are not local."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megamoe.config.data import DataConfig
from megamoe.core.errors import DataError, UserError
from megamoe.core.urls import masked, unsigned
from megamoe.data.remote.cache import ShardCache
from megamoe.data.shards.catalog import DataSet, Source
from megamoe.data.shards.expand import iter_shards
from megamoe.data.shards.names import ShardNames, name_hashes, repeated


def open_data_set(data: DataConfig, index_dir: Path) -> DataSet:
    """Return the shards of ``data.train``. Folders are listed, but no shard is opened.

    Args:
        data: section ``data`` of the config.
        index_dir: folder for new indexes if ``data.index`` is not set.

    Raises:
        UserError: ``data.train`` is empty.
        DataError: a shard is missing, or named twice.
    """
    if not data.train:
        raise UserError("data.train is empty: name the training shards, for example data.train=shards/{00000..00063}.tar")
    sources = [
        Source(source.name or str(number), ShardNames(iter_shards(source.shards)), source.weight)
        for number, source in enumerate(data.train)
    ]
    _check_owners(sources)
    return DataSet(sources, data.index or index_dir, data.held_out)


def _check_owners(sources: Sequence[Source]) -> None:
    if len(sources) == 1:
        return
    twice = repeated(np.concatenate([name_hashes(map(unsigned, source.shards)) for source in sources]))
    owner: dict[str, str] = {}
    for source in sources if twice else ():
        for shard in source.shards:
            name = unsigned(shard)
            if hash(name) in twice and owner.setdefault(name, source.name) != source.name:
                raise DataError(
                    f"shard {masked(shard)}: is in the sources {owner[name]} and {source.name} of data.train; "
                    "name it in one"
                )


def open_cache(data: DataConfig) -> ShardCache:
    """Return the node's cache of shards that are not local files."""
    folder = data.cache or Path(os.environ.get("MEGAMOE_CACHE", "~/.cache/megamoe/shards")).expanduser()
    return ShardCache(folder, int(data.cache_gb * 1e9))
