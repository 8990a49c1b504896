"""Copy this rank's part of a checkpoint to host memory, between two steps while nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megamoe.core.errors import CheckpointError

_ALIGN = 64  # bytes; copies are fastest between cache lines


class Snapshot:
    """Host memory for a copy, allocated once and refilled for each save; only one copy is in use at a time.

    Args:
        device: Device of the tensors. On a GPU the copies to pinned memory are queued between the kernels of the last step
            and those of the next, so nothing waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._buffer: Tensor | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Copy flat tensors, with the same names and sizes at each call.

        Returns:
            The copies, and a function that waits until they are complete; any thread may call it.

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
