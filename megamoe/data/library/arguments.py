"""Check the arguments of :class:`.ShardDataset`; an error is one line that names the argument."""

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
    """Return section ``data`` of a config with these settings. Errors call ``train`` by its name here, ``urls``."""
    try:
        return DataConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join("urls" if part == "train" else str(part) for part in first["loc"])
        raise UserError(f"{name} {first['input']!r}: {first['msg']}") from None


def plain_names(urls: Shards) -> Any:
    """Return ``urls`` with paths as strings."""
    if isinstance(urls, str | Path):
        return str(urls)
    return [str(each) if isinstance(each, Path) else each for each in urls]


def which_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return this rank and the number of ranks: as given, else from torch.distributed, else from the environment."""
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
    """Return the micro-batch; the default is a rank's whole part of the global batch.

    Raises:
        UserError: the global batch is not a whole number of micro-batches on each rank.
    """
    size = at_least("global_batch", global_batch, 1) // ranks if micro_batch is None else micro_batch
    if size < 1 or global_batch % (size * ranks):
        what = f"micro_batch {micro_batch} x " if micro_batch is not None else ""
        raise UserError(f"global_batch {global_batch}: not a multiple of {what}{ranks} ranks; change one of them")
    return size


def at_least(name: str, value: int, least: int) -> int:
    """Return ``value`` if it is a whole number of at least ``least``; otherwise raise UserError."""
    if not isinstance(value, int) or value < least:
        raise UserError(f"{name} {value!r}: must be a whole number of {least} or more")
    return value
