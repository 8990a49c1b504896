"""Data plane: shard index -> order -> storage -> decode -> pack -> loader.

``shards`` turns names into files, ``index`` knows where each sample lies in its tar, ``order`` says which sample comes
when, ``storage`` brings its bytes, ``decode`` and ``tokenizer`` make pixels and ids of them, ``pack`` and ``lane`` lay
them into sequences, and ``loader`` hands a rank its part of each optimizer step. ``samples`` reads shards front to back
for evaluation; ``dataset`` is the same order for other people's training loops. Nothing here imports DeepSpeed, and what
the decoding processes load (``worker`` and all that it imports) not even torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe.data.catalog import BadShard
    from megamoe.data.dataset import ShardDataset
    from megamoe.data.decode import CorruptSample
    from megamoe.data.samples import read_samples
    from megamoe.data.shards import expand_shards

__all__ = ["BadShard", "CorruptSample", "ShardDataset", "expand_shards", "read_samples"]

# imported when they are asked for: torch and webdataset take seconds, and `megamoe --help` needs neither
_MODULES = {
    "BadShard": "catalog",
    "CorruptSample": "decode",
    "ShardDataset": "dataset",
    "expand_shards": "shards",
    "read_samples": "samples",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
