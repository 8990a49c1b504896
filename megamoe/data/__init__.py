"""Data plane: from shards to the packed batch of each optimizer step.

``order`` says which sample comes when, ``shards`` where it lies and what its bytes are, ``remote`` brings shards that are
no local files, ``sample`` makes pixels and token ids of the bytes and packs them, and ``loader`` hands a rank its part of
each step. ``library`` is the same order for other people's training loops. Nothing here imports DeepSpeed, and what the
worker processes load (``loader.worker`` and all that it imports) not even torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe.data.library.dataset import ShardDataset
    from megamoe.data.sample.decode import CorruptSample
    from megamoe.data.shards.catalog import BadShard
    from megamoe.data.shards.expand import expand_shards
    from megamoe.data.shards.sequential import read_samples

__all__ = ["BadShard", "CorruptSample", "ShardDataset", "expand_shards", "read_samples"]

# imported when they are asked for: torch and webdataset take seconds, and `megamoe --help` needs neither
_MODULES = {
    "BadShard": "shards.catalog",
    "CorruptSample": "sample.decode",
    "ShardDataset": "library.dataset",
    "expand_shards": "shards.expand",
    "read_samples": "shards.sequential",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
