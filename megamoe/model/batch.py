"""What the layers of a stage work out from a packed batch: once per micro-batch, and without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

IGNORE = -100
"""Label of a position that is not predicted."""

_Value = TypeVar("_Value")

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def once_per_batch(text_B3L: Tensor, what: Hashable, make: Callable[[], _Value]) -> _Value:
    """Return ``make()``, computed at the first call for this batch and kept as long as its text is.

    The value must not be a view of the text, or it would keep the text alive.
    """
    known: dict[Hashable, Any] | None = _known.get(text_B3L)
    if known is None:
        known = _known[text_B3L] = {}
    if what not in known:
        known[what] = make()
    value: _Value = known[what]
    return value


def patches_in_use(text_B3L: Tensor, image_token: int, patch_tokens: int) -> Tensor:
    """Return which of the ``patch_tokens`` patches of each sequence belong to its pictures, bool (B, S)."""

    def compare() -> Tensor:
        used_B1 = (text_B3L[:, 0] == image_token).sum(1, keepdim=True)
        return torch.arange(patch_tokens, device=text_B3L.device) < used_B1

    return once_per_batch(text_B3L, "patches in use", compare)


def announce_labels(text_B3L: Tensor, count: int) -> None:
    """State how many positions of the batch have a label, so that :func:`labelled_positions` need not ask the device."""
    once_per_batch(text_B3L, "labels", lambda: count)


def labelled_positions(text_B3L: Tensor) -> Tensor:
    """Return the positions with a label, in order, int64 (N,), counted through the flattened (B, L)."""

    def find() -> Tensor:
        count: int | None = (_known.get(text_B3L) or {}).get("labels")
        labelled = text_B3L[:, 2].flatten() != IGNORE
        if count is None:
            return labelled.nonzero().squeeze(1)
        return labelled.logical_not().to(torch.uint8).argsort(stable=True)[:count]

    return once_per_batch(text_B3L, "labelled positions", find)
