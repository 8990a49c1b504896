"""DeepSpeed's own checkpoints. Only `megamoe bench checkpoint` writes them, to compare ours with."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from megamoe.parallel.deepspeed.engine import TrainEngine

_TAG = "bench"


def save_own_checkpoint(engine: TrainEngine, folder: Path) -> None:
    """Save by DeepSpeed's own means. All ranks call."""
    with _as_if_dense(engine):
        engine.deepspeed.save_checkpoint(str(folder), tag=_TAG)


def load_own_checkpoint(engine: TrainEngine, folder: Path) -> None:
    """Load what :func:`save_own_checkpoint` wrote, under the same layout. All ranks call."""
    with _as_if_dense(engine):
        engine.deepspeed.load_checkpoint(str(folder), tag=_TAG)


@contextlib.contextmanager
def _as_if_dense(engine: TrainEngine) -> Iterator[None]:
    """Treat experts as dense parameters: each rank writes and reads what it owns.

    DeepSpeed 0.19.8 saves experts of its own layer classes only.
    """
    before, engine.deepspeed.has_moe_layers = engine.deepspeed.has_moe_layers, False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        engine.deepspeed.has_moe_layers = before
