"""Checkpoints of configs/1b.yaml: 12.5 GB saved, saved beside training, and loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.gpu.batches import micro_batches, targets
from benchmarks.gpu.context import Context
from benchmarks.gpu.model_1b import MICRO_BATCHES, build, config_1b
from megamoe.checkpoint.checkpointer import Checkpointer
from megamoe.checkpoint.folders import checkpoint_name
from megamoe.checkpoint.train_state import TrainState
from megamoe.metrics.counters import Counters

ROOM = 30e9  # two checkpoints


def measure(context: Context) -> None:
    """Record seconds of each; the folder is in memory if the disk is full or slow, and the page says so."""
    from megamoe.parallel.deepspeed.process_group import joined_world

    folder = context.scratch
    memory = Path("/dev/shm")
    if not context.tiny and shutil.disk_usage(folder).free < ROOM < shutil.disk_usage(memory).free:
        folder = memory / folder.name
    context.record("folder", "memory" if folder != context.scratch else "disk")
    rows = 1 if context.tiny else 4
    config = config_1b(context, rows, f"run.dir={folder / 'run'}", "checkpoint.async=true", "checkpoint.keep=1")
    batches = micro_batches(config, MICRO_BATCHES, rows, seed=1)
    try:
        with joined_world() as device:
            engine = build(config, device)
            checkpointer = Checkpointer(config.run.folder, config.checkpoint, config.optim, engine)
            done = 0

            def step() -> None:
                nonlocal done
                engine.step(batches, targets(batches), 1e-4)
                done += 1

            def state() -> TrainState:
                return TrainState(
                    counters=Counters(step=done), position={},
                    config=config.model_dump(mode="json"), tokenizer="", data="",
                )  # fmt: skip

            for _ in range(2):
                step()
            context.record("step_seconds", context.seconds(step, repeats=3, warm_up=0))
            seconds = context.clock(lambda: checkpointer.write(state(), None))
            path = folder / "run" / "checkpoints" / checkpoint_name(done)
            size = sum(file.stat().st_size for file in path.iterdir())
            context.record("bytes", size)
            context.record("save", {"seconds": seconds, "bytes_per_second": size / seconds})
            seconds = context.clock(lambda: checkpointer.load(path))
            context.record("load", {"seconds": seconds, "bytes_per_second": size / seconds})
            for name in ("first", "second"):  # the first one takes the pinned memory
                step()
                context.synchronize()
                stall = context.clock(lambda: checkpointer.save(state(), None))
                beside: list[float] = []
                while checkpointer.busy and len(beside) < 200:
                    beside.append(context.clock(step))
                    checkpointer.poll()
                rest = context.clock(checkpointer.finish)
                worst = max(beside, default=0.0)
                figures = {"stall_seconds": stall, "steps beside it": len(beside), "slowest_seconds": worst}
                context.record(f"async save, {name}", figures | {"rest_seconds": rest})
    finally:
        if folder != context.scratch:
            shutil.rmtree(folder, ignore_errors=True)
