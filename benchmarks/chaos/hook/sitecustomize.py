"""Python imports this file at the start of every process of a trial.

In ranks a step and a sync of the disk take a set time longer, so that a moment in them can be hit (a step as long as the
file CHAOS_PACE says, in seconds, where that is set), and a gradient becomes
NaN where the trial says so (CHAOS_NAN: ``STEP,RANK,once|lasting,FILE``; FILE is made when it happens).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

STEP_SECONDS, SYNC_SECONDS = 0.1, 0.05


class _AfterImport(importlib.abc.MetaPathFinder):
    """Changes the trainer once it is imported; nothing heavy is imported for it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "megamoe.train.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def and_change(module: ModuleType) -> None:
            execute(module)
            _change(module.Trainer)

        spec.loader.exec_module = and_change  # type: ignore[method-assign]
        return spec


def _change(trainer: Any) -> None:
    compute = trainer._compute

    def changed(self: Any, *arguments: Any) -> Any:
        time.sleep(_pace())
        handle = _poison(self)
        try:
            return compute(self, *arguments)
        finally:
            if handle is not None:
                handle.remove()

    trainer._compute = changed


def _pace() -> float:
    path = os.environ.get("CHAOS_PACE")
    return STEP_SECONDS if path is None else float(Path(path).read_text())


def _poison(trainer: Any) -> Any:
    step, rank, how, mark = os.environ.get("CHAOS_NAN", "0,0,never,").split(",", 3)
    # A smaller layout may have no such rank any more.
    if trainer.step + 1 != int(step) or int(os.environ["RANK"]) != int(rank) % int(os.environ["WORLD_SIZE"]):
        return None
    if how == "once" and Path(mark).exists():
        return None
    left = [1] if how == "once" else [1 << 30]

    def spoil(gradient: Any) -> Any:
        left[0] -= 1
        Path(mark).touch()
        return gradient * (float("nan") if left[0] >= 0 else 1.0)

    parameter = next(each for each in trainer.engine.parameters.values())
    return parameter.register_hook(spoil)


if "RANK" in os.environ and "CHAOS_TRIAL" in os.environ:
    sync = os.fsync

    def _slow_sync(fd: Any) -> None:
        time.sleep(SYNC_SECONDS)
        sync(fd)

    os.fsync = _slow_sync
    sys.meta_path.insert(0, _AfterImport())
