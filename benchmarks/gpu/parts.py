"""The parts, in order of worth, and the seconds that each may take. Those cut off keep what they have recorded."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """``module.measure(context)`` in a process that is ended after ``seconds``."""

    module: str
    seconds: int
    about: str


PARTS = {
    "machine": Part("machine", 40, "The machine: matrix products, copies, launches"),
    "parity": Part("parity", 70, "Parity with the CPU, one rank"),
    "kernels": Part("kernels", 80, "Kernels against plain versions"),
    "sweep": Part("sweep", 100, "configs/1b.yaml, data in memory"),
    "profile": Part("one_step", 60, "One step of configs/1b.yaml, taken apart"),
    "ranks": Part("ranks", 80, "Parity of 2 and 4 ranks on the one GPU"),
    "tars": Part("tars", 70, "configs/1b.yaml from tar shards"),
    "checkpoint": Part("saving", 90, "Checkpoints of configs/1b.yaml"),
    "moves": Part("moves", 70, "A checkpoint from CPU to GPU and back"),
    "generate": Part("generating", 45, "Generation"),
    "faults": Part("faults", 90, "A spike, NaN, a hang"),
}
