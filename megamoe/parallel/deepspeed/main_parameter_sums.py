"""Whether the fp32 masters and moments that a rank owns are still what its last update left.

No other rank has them to compare with, and an update spreads a fault in them over all replicas alike. So each rank adds up
their bits after an update, and again before the next one: a bit that flipped in between is seen. Both passes only read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.parallel.deepspeed.engine import TrainEngine
from megamoe.parallel.deepspeed.main_parameters import flat_partitions


class MasterSums:
    """Watches over the optimizer's memory on this rank, from an update to the next.

    Args:
        engine: What owns it.
        enabled: Whether to look at all.

    Attributes:
        changed: Whether anything in it has changed outside of an update; stays so.
    """

    def __init__(self, engine: TrainEngine, enabled: bool):
        self._engine, self._enabled = engine, enabled
        self._noted: Tensor | None = None
        self._changed = torch.zeros((), dtype=torch.bool, device=engine.device)

    @property
    def changed(self) -> bool:
        return bool(self._changed)

    def note(self) -> None:
        """The masters are right now: an update, or a load, is done."""
        self._noted = self._sums() if self._enabled else None

    def check(self) -> None:
        """An update is about to be made. Nothing waits for the device here."""
        if self._noted is not None:
            self._changed |= (self._sums() != self._noted).any()

    def _sums(self) -> Tensor:
        states = self._engine.deepspeed.basic_optimizer.state
        flats = flat_partitions(self._engine.deepspeed.optimizer)
        moments = [value for flat in flats for value in states.get(flat, {}).values() if torch.is_tensor(value)]
        return torch.stack([_bit_sum(tensor.detach()) for tensor in [*flats, *moments] if tensor.dim()])


def _bit_sum(tensor: Tensor) -> Tensor:
    """Sum over the bits of an fp32 vector; it may wrap around. In words of 64 bits it takes a twentieth of the time."""
    wide = tensor.numel() % 2 == 0 and tensor.data_ptr() % 8 == 0
    return tensor.view(torch.int64 if wide else torch.int32).sum(dtype=torch.int64)
