"""Run one rank of `megamoe bench checkpoint`: python -m megamoe.bench.saving_ranks CONFIG FOLDER ROUNDS [KEY=VALUE]..."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from megamoe.checkpoint.checkpointer import Checkpointer
from megamoe.checkpoint.folders import checkpoint_name
from megamoe.checkpoint.train_state import TrainState
from megamoe.config import Config, load_config
from megamoe.core.packed_batch import empty_text, write_sample
from megamoe.metrics.counters import Counters
from megamoe.parallel.deepspeed.engine import MicroBatch, TrainEngine
from megamoe.parallel.deepspeed.main_parameters import owned_pieces
from megamoe.parallel.deepspeed.own_checkpoint import load_own_checkpoint, save_own_checkpoint
from megamoe.parallel.deepspeed.process_group import joined_world
from megamoe.parallel.layout import plan_layout

_IMAGE, _WORD = 0, 5
_STEPS = 5


class Bench:
    """An engine that trains on random pictures, and the ways to save and load it."""

    def __init__(self, config: Config, folder: Path, device: torch.device):
        self.config, self.folder, self.rank = config, folder, dist.get_rank()
        self.layout = plan_layout(config, dist.get_world_size())
        self.engine = TrainEngine(config, self.layout, _IMAGE, device)
        self.checkpointer = Checkpointer(config.run.folder, config.checkpoint, config.optim, self.engine)
        self.batches = _random_batches(config, self.layout.accumulation) if self.engine.loads_data else []
        # Collectives of DCP's own thread must not meet those of the training.
        self.background = dist.new_group(backend="gloo")
        self.step_number = 0
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def step(self) -> None:
        """Train on the same batch."""
        self.step_number += 1
        self.engine.step(self.batches, self.config.train.global_batch, 1e-5)

    def tensors(self) -> dict[str, Tensor]:
        """Return what this rank owns, as views into the optimizer's memory."""
        pieces = owned_pieces(self.engine, self.checkpointer.moments)
        return {f"{piece.name}@{piece.start}": piece.data for piece in pieces}

    def run(self, rounds: int) -> dict[str, Any]:
        """Measure all figures; the first round warms up and is not counted."""
        self.step()
        for _ in range(_STEPS):
            self._timed("step", self.step)
        size, failures = 0, {}
        # For each view torch.save would write the whole buffer behind it.
        self._copies = {name: tensor.clone() for name, tensor in self.tensors().items()}
        for _ in range(rounds + 1):
            for name, save, load in (
                ("torch", self._torch_save, self._torch_load),
                ("ours", self._ours_save, self._ours_load),
                ("dcp", self._dcp_save, self._dcp_load),
                ("deepspeed", self._deepspeed_save, self._deepspeed_load),
            ):
                path = self.folder / name
                try:
                    self._timed(f"save {name}", partial(save, path))
                    if name == "ours":
                        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                    self._forget(path)
                    self._timed(f"load {name}", partial(load, path))
                except Exception as error:  # a peer that cannot save this layout is a result
                    if name != "deepspeed":
                        raise
                    failures[name] = f"{type(error).__name__}: {error}"
                self._remove(path)
            self._stalls()
        middle = {name: statistics.median(each[1:]) for name, each in self.seconds.items()}
        names = ("ours", "torch", "dcp", "deepspeed")
        return {
            "bytes": size,
            "step_seconds": middle["step"],
            "save_seconds": {name: middle.get(f"save {name}") for name in names},
            "load_seconds": {name: middle.get(f"load {name}") for name in names},
            "stall_seconds": {name: middle[f"stall {name}"] for name in ("ours", "dcp")},
            "failures": failures,
            "all_rounds": self.seconds,
        }

    def _timed(self, name: str, work: Callable[[], object]) -> None:
        """Time ``work`` until the last rank is done, on this rank's clock."""
        dist.barrier()
        started = time.perf_counter()
        work()
        dist.barrier()
        self.seconds[name].append(time.perf_counter() - started)

    def _stalls(self) -> None:
        """Measure how long training pauses, at the slowest rank, for a save that runs beside steps."""
        stalls = {}
        self.step()
        paused = _clock(lambda: self.checkpointer.save(self._state(), None))
        while self.checkpointer.busy:
            self.step()
            paused += _clock(self.checkpointer.poll)
        stalls["ours"] = paused
        self._remove(self.folder / "ours")
        self.step()
        path, tensors = self.folder / "dcp", self._of_this_rank()
        answer: list[Any] = []
        stalls["dcp"] = _clock(
            lambda: answer.append(
                dcp_async_save(tensors, storage_writer=FileSystemWriter(path), process_group=self.background)
            )
        )
        self.step()
        answer[0].result()
        self._remove(path)
        for name, stall in stalls.items():
            worst = torch.tensor([stall], dtype=torch.float64, device=self.engine.device)
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            self.seconds[f"stall {name}"].append(worst.item())

    def _ours_save(self, path: Path) -> None:
        self.checkpointer.write(self._state(), None)

    def _ours_load(self, path: Path) -> None:
        self.checkpointer.load(path / "checkpoints" / checkpoint_name(self.step_number))

    def _torch_save(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        with (path / f"{self.rank}.pt").open("wb") as file:
            torch.save(self._copies, file)
            file.flush()
            os.fsync(file.fileno())

    def _torch_load(self, path: Path) -> None:
        loaded = torch.load(path / f"{self.rank}.pt", map_location="cpu")
        for name, tensor in self.tensors().items():
            tensor.copy_(loaded[name])

    def _dcp_save(self, path: Path) -> None:
        dcp_save(self._of_this_rank(), storage_writer=FileSystemWriter(path))

    def _dcp_load(self, path: Path) -> None:
        dcp_load(self._of_this_rank(), storage_reader=FileSystemReader(path))

    def _deepspeed_save(self, path: Path) -> None:
        save_own_checkpoint(self.engine, path)
        dist.barrier()
        for file in sorted(path.rglob("*"))[self.rank :: dist.get_world_size()]:
            if file.is_file():
                _sync(file)

    def _deepspeed_load(self, path: Path) -> None:
        load_own_checkpoint(self.engine, path)

    def _of_this_rank(self) -> dict[str, Tensor]:
        """Name each piece after its rank: plain DCP does not know ranges of flattened tensors."""
        return {f"{self.rank}/{name}": tensor for name, tensor in self.tensors().items()}

    def _state(self) -> TrainState:
        return TrainState(
            counters=Counters(step=self.step_number), position={},
            config=self.config.model_dump(mode="json"), tokenizer="", data="",
        )  # fmt: skip

    def _forget(self, path: Path) -> None:
        """Drop the files from the page cache, so that a load reads the disk."""
        dist.barrier()
        if self.rank == 0:
            for file in path.rglob("*"):
                if file.is_file():
                    _sync(file, forget=True)
        dist.barrier()

    def _remove(self, path: Path) -> None:
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        dist.barrier()


def _random_batches(config: Config, count: int) -> list[MicroBatch]:
    """Micro-batches of noise, as full of pictures and captions as real ones."""
    data, vision = config.data, config.model.vision
    rows, length, pictures = config.train.micro_batch, data.sequence_length, data.images_per_sequence
    each = length // pictures
    text_B3L = empty_text(rows, length, _WORD)
    for row_3L in text_B3L:
        for picture in range(pictures):
            write_sample(row_3L, picture * each, picture + 1, _IMAGE, vision.patches, [_WORD] * (each - vision.patches))
    side = vision.image_size
    pixels = torch.randint(0, 256, (count, rows, pictures, side, side, 3), dtype=torch.uint8)
    text = torch.from_numpy(text_B3L)
    return [(pixels[i], text) for i in range(count)]


def _clock(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _sync(file: Path, forget: bool = False) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def main() -> None:
    """Measure, and write the figures to FOLDER/results.json on rank 0."""
    path, folder, rounds, *overrides = sys.argv[1:]
    run = f"run.dir={folder}/ours"
    config = load_config(path, [*overrides, run, "checkpoint.async=true", "checkpoint.keep=1000"])
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    with joined_world() as device:
        bench = Bench(config, Path(folder), device)
        figures = bench.run(int(rounds))
        if bench.rank == 0:
            (Path(folder) / "results.json").write_text(json.dumps(figures), encoding="utf-8")
        dist.barrier()


if __name__ == "__main__":
    main()
