"""The arguments of :class:`.ShardDataset`: checked, with one line that names what does not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import ValidationError

from megamoe.config.data import DataConfig
from megamoe.core.errors import UserError

Shards = str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]]


def checked_settings(**settings: Any) -> DataConfig:
    """Section ``data`` of a config with these settings; ``train`` is what the caller knows as ``urls``."""
    try:
        return DataConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join("urls" if part == "train" else str(part) for part in first["loc"])
        raise UserError(f"{name} {first['input']!r}: {first['msg']}") from None


def plain_names(urls: Shards) -> Any:
    """``urls`` with strings for paths."""
    if isinstance(urls, str | Path):
        return str(urls)
    return [str(each) if isinstance(each, Path) else each for each in urls]


def which_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This rank and how many there are: as given, of torch.distributed, of the environment, or alone."""
    if (rank is None) != (world_size is None):
        raise UserError("rank and world_size: give both or neither")
    if rank is None or world_size is None:
        if dist.is_available() and dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        else:
            rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank}: is not one of {world_size} ranks (0 to {world_size - 1})")
    return rank, world_size


def whole_micro_batch(global_batch: int, micro_batch: int | None, ranks: int) -> int:
    """The micro-batch, by default all that a rank has of the global batch; it must go into it a whole number of times."""
    size = at_least("global_batch", global_batch, 1) // ranks if micro_batch is None else micro_batch
    if size < 1 or global_batch % (size * ranks):
        what = f"micro_batch {micro_batch} x " if micro_batch is not None else ""
        raise UserError(f"global_batch {global_batch}: not a multiple of {what}{ranks} ranks; change one of them")
    return size


def at_least(name: str, value: int, least: int) -> int:
    """``value`` if it is a whole number of ``least`` or more."""
    if not isinstance(value, int) or value < least:
        raise UserError(f"{name} {value!r}: must be a whole number of {least} or more")
    return value
