"""Collectives of several ranks on one GPU: NCCL refuses them, so they go through host memory with gloo.

For checks of the maths only. It is slow, and point-to-point messages of gloo cannot carry memory of a GPU at all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_RESULT = {
    "all_reduce": 0, "broadcast": 0, "reduce": 0, "all_gather": 0, "all_gather_into_tensor": 0, "reduce_scatter": 0,
    "reduce_scatter_tensor": 0, "all_to_all": 0, "all_to_all_single": 0, "scatter": 0, "gather": 1, "recv": 0, "irecv": 0,
    "send": None, "isend": None,
}  # fmt: skip
"""Collectives, and the place of the argument that each writes to. Others stay as they are, or autograd would complain."""


class _Done:
    """The handle of an asynchronous call that is complete already."""

    def wait(self, *_: object) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True


def stage_collectives(needs: Callable[[Tensor], bool] = lambda tensor: tensor.is_cuda) -> None:
    """From now on copy the tensors that ``needs`` picks to host memory before each collective, and back after it."""
    for name, result in _RESULT.items():
        setattr(dist, name, _staged(getattr(dist, name), result, needs))


def _staged(collective: Callable[..., Any], result: int | None, needs: Callable[[Tensor], bool]) -> Callable[..., Any]:
    signature = inspect.signature(collective)
    written = None if result is None else list(signature.parameters)[result]

    def staged(value: Any, copies: list[tuple[Tensor, Tensor]]) -> Any:
        if isinstance(value, torch.Tensor) and needs(value):
            copies.append((value, value.detach().to("cpu", copy=True)))
            return copies[-1][1]
        if isinstance(value, list | tuple) and any(isinstance(each, torch.Tensor) for each in value):
            return [staged(each, copies) for each in value]
        return value

    @functools.wraps(collective)
    def call(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        copies: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in bound.arguments}
        bound.arguments.update({name: staged(value, copies[name]) for name, value in bound.arguments.items()})
        work = collective(*bound.args, **bound.kwargs)
        if any(copies.values()) and hasattr(work, "wait"):
            work.wait()
            work = _Done()
        with torch.no_grad():
            for tensor, copy in copies.get(written, []) if written is not None else []:
                tensor.copy_(copy)
        return work

    return call
