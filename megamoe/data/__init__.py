"""Turn shards into the packed batch of each optimizer step.

``order`` decides which sample fills which slot of a step. ``shards`` finds the sample in its tar and reads its bytes;
``remote`` downloads shards that are not local files. ``sample`` decodes the bytes to pixels and token ids and packs
them. ``loader`` does this in worker processes and hands each rank its part of a step. ``library`` offers the same order
to other training loops as a PyTorch data set.

Nothing here imports DeepSpeed. What the worker processes load (``loader.worker`` and everything it imports) does not
import torch either.
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

# Imported on first use: torch and webdataset take seconds, and `megamoe --help` needs neither.
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
