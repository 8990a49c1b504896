"""Broadcast what one rank finds out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megamoe.core.errors import UserError

Found = TypeVar("Found")


def from_rank_0(find: Callable[[], Found]) -> Found:
    """Run a function on rank 0 and broadcast its result or its ``UserError``. All ranks call."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = find()
        except UserError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    found: Found = answer[0]
    return found
