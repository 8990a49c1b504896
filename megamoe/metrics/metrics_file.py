"""RUN/metrics.jsonl: the record of each optimizer step, each step once however often the run was resumed.

Keys: ``step loss lm_loss aux_loss z_loss grad_norm lr tokens samples step_seconds data_seconds tokens_per_second
model_flops_per_second world_size lost truncated recomputed skipped spikes rolled_back``, ``bad_shards`` (shards in
quarantine) and ``load``, which maps a sparse layer's name to the fraction of its routed tokens that each expert got (a
list of E floats).
``sources`` has for each source of the data what this step took from it (``samples bytes decode_seconds lost_image
lost_caption lost_incomplete lost_shard``), ``reading`` what bringing it took on all ranks (``downloads cache_hits retries
received seconds``; bytes and seconds of the workers).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from megamoe.core.errors import UserError
from megamoe.metrics import jsonl

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records to RUN/metrics.jsonl. One process of a run holds one.

    Args:
        run_dir: folder of the run; made when it is not there.
        resume_step: last step whose effect is in the weights; later lines are dropped, since these steps come again.
            None for a new run.

    Raises:
        UserError: a new run in a folder that has metrics already.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        self._last: int | None = None
        if resume_step is None:
            refuse_existing(run_dir)
        else:
            self._last = jsonl.truncate(path, resume_step)
        self._file: BinaryIO = path.open("ab")

    def write(self, record: Mapping[str, object]) -> None:
        """Append ``record``; its ``step`` is larger than the last one's. NaN and infinities become ``null``."""
        step = record["step"]
        assert isinstance(step, int), f"step {step!r} is no int"
        assert self._last is None or step > self._last, f"step {step} after step {self._last}"
        jsonl.append(self._file, jsonl.to_line(record))
        self._last = step

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def refuse_existing(run_dir: Path) -> None:
    """Keep a new run from writing over an old one.

    Raises:
        UserError: ``run_dir`` has metrics of a run.
    """
    path = run_dir / METRICS_FILE
    if path.exists() and path.stat().st_size > 0:
        raise UserError(
            f"run.dir {run_dir}: holds a run already ({METRICS_FILE} is not empty); "
            "go on with it by --resume auto, or choose another run.name"
        )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All complete records of a run in order; also of one that is being written. ``null`` reads as None.

    Raises:
        UserError: the folder has no metrics.jsonl, or a line of it is damaged.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        raise UserError(f"{run_dir}: no {METRICS_FILE} there; name the folder of a run that has trained")
    return [record for _, record in jsonl.read_lines(path)]
