"""A copy of this rank's part of a checkpoint in host memory, taken between two steps while nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megamoe.core.errors import CheckpointError

_ALIGN = 64  # bytes; copies are fastest between cache lines


class Snapshot:
    """Host memory for a copy, allocated once and filled again for each save; only one copy is in use at a time.

    Args:
        device: Where the tensors live. From a GPU they are copied behind the kernels that are queued there, into pinned
            memory, and nobody waits: the kernels of the next step are queued behind the copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._buffer: Tensor | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Copy flat tensors, the same names and sizes each time.

        Returns:
            The copies, which are complete after the second value has been called, in any thread.

        Raises:
            CheckpointError: there is not enough memory.
        """
        places, end = {}, 0
        for key, tensor in tensors.items():
            places[key] = end
            end += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
        if self._buffer is None:
            try:
                self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=self._cuda)
            except RuntimeError as error:
                raise CheckpointError(
                    f"checkpoint.async: no {end:,} bytes of host memory for the copy ({error}); set checkpoint.async=false"
                ) from None
        assert len(self._buffer) == end, "what a rank writes does not change during a run"
        copies = {}
        for key, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            copies[key] = self._buffer[places[key] : places[key] + size].view(tensor.dtype)
        torch._foreach_copy_(list(copies.values()), list(tensors.values()), non_blocking=self._cuda)
        if not self._cuda:
            return copies, lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return copies, copied.synchronize
