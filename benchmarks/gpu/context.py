"""Surroundings of a part: the device, where to write, and a clock that waits for the device."""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Context:
    """The surroundings of a part.

    Attributes:
        device: Where it measures.
        tiny: Whether sizes are such that a CPU is done in seconds; the figures then mean nothing.
        data: Folder with ``train`` and ``tokenizer.model``.
        scratch: Folder for what is thrown away afterwards.
        result: JSON file of this part.
        figures: What is recorded so far.
    """

    device: torch.device
    tiny: bool
    data: Path
    scratch: Path
    result: Path
    figures: dict[str, Any] = field(default_factory=dict)

    def record(self, name: str, value: object) -> None:
        """Keep a figure, even if the part is ended in the next moment."""
        self.figures[name] = value
        new = self.result.with_suffix(".new")
        new.write_text(json.dumps(self.figures), encoding="utf-8")
        new.replace(self.result)
        print(f"{name}: {json.dumps(value)}", flush=True)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 10, warm_up: int = 3) -> float:
        """Median seconds of ``work`` on the device, each run by itself."""
        for _ in range(warm_up):
            work()
        return statistics.median(self.clock(work) for _ in range(repeats))

    def clock(self, work: Callable[[], object]) -> float:
        """Seconds until the device is done with ``work``."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def environment(self, **more: str) -> dict[str, str]:
        """Variables for a process that this part starts."""
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **more}
        if not self.cuda:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return environment


def be_the_only_rank() -> None:
    """Set the variables of a run of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(one)
