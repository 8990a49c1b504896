"""What the layers of a stage derive from packed text: once per micro-batch, and without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from megamoe.core.packed_batch import IGNORE, PackedBatch

_Value = TypeVar("_Value")

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def once_per_batch(text_B3L: Tensor, what: Hashable, make: Callable[[], _Value]) -> _Value:
    """Return ``make()``, computed at the first call for this text and kept as long as the text lives.

    The value must not be a view of the text, because it would keep the text alive.
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
        used_B1 = (PackedBatch.of(text_B3L).ids == image_token).sum(1, keepdim=True)
        return torch.arange(patch_tokens, device=text_B3L.device) < used_B1

    return once_per_batch(text_B3L, "patches in use", compare)


def valid_tokens(text_B3L: Tensor) -> Tensor:
    """Return which tokens are not padding, bool (B, L)."""
    return once_per_batch(text_B3L, "valid tokens", lambda: PackedBatch.of(text_B3L).segments > 0)


def announce_labels(text_B3L: Tensor, count: int) -> None:
    """State how many positions have a label, so that :func:`labelled_positions` need not ask the device."""
    once_per_batch(text_B3L, "labels", lambda: count)


def labelled_positions(text_B3L: Tensor) -> Tensor:
    """Return the positions with a label, in order, int64 (N,), counted through the flattened (B, L)."""

    def find() -> Tensor:
        count: int | None = (_known.get(text_B3L) or {}).get("labels")
        labelled = PackedBatch.of(text_B3L).labels.flatten() != IGNORE
        if count is None:
            return labelled.nonzero().squeeze(1)
        return labelled.logical_not().to(torch.uint8).argsort(stable=True)[:count]

    return once_per_batch(text_B3L, "labelled positions", find)
