"""Detect changes of the main parameters (fp32) and moments that a rank owns, from one update to the next.

No other rank has a copy to compare with, and an update spreads a fault in them to all replicas alike. So each rank sums
their bits after an update and again before the next one: a bit that flipped in between shows. Both passes only read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.parallel.deepspeed.engine import TrainEngine
from megamoe.parallel.deepspeed.main_parameters import flat_partitions


class MainParameterSums:
    """Bit sums over the optimizer's memory on this rank.

    Args:
        engine: The engine that owns the memory.
        enabled: Whether to compute sums at all.

    Attributes:
        changed: Whether anything has ever changed outside of an update.
    """

    def __init__(self, engine: TrainEngine, enabled: bool):
        self._engine, self._enabled = engine, enabled
        self._noted: Tensor | None = None
        self._changed = torch.zeros((), dtype=torch.bool, device=engine.device)

    @property
    def changed(self) -> bool:
        return bool(self._changed)

    def note(self) -> None:
        """Record the sums right after an update or a load, when the main parameters are known to be right."""
        self._noted = self._sums() if self._enabled else None

    def check(self) -> None:
        """Compare the sums right before an update. Does not wait for the device."""
        if self._noted is not None:
            self._changed |= (self._sums() != self._noted).any()

    def _sums(self) -> Tensor:
        states = self._engine.deepspeed.basic_optimizer.state
        flats = flat_partitions(self._engine.deepspeed.optimizer)
        moments = [value for flat in flats for value in states.get(flat, {}).values() if torch.is_tensor(value)]
        return torch.stack([_bit_sum(tensor.detach()) for tensor in [*flats, *moments] if tensor.dim()])


def _bit_sum(tensor: Tensor) -> Tensor:
    """Sum the bits of an fp32 vector; the sum may wrap around. Words of 64 bits take a twentieth of the time."""
    wide = tensor.numel() % 2 == 0 and tensor.data_ptr() % 8 == 0
    return tensor.view(torch.int64 if wide else torch.int32).sum(dtype=torch.int64)
