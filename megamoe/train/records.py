"""What a run writes for people while it trains: metrics.jsonl, TensorBoard, the progress line, lost samples, audit."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megamoe.config import Config
from megamoe.core.packed_batch import PackedBatch
from megamoe.data.loader.lane import LostSample
from megamoe.data.loader.step_loader import StepBatch
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.metrics import jsonl
from megamoe.metrics.audit import AuditWriter
from megamoe.metrics.metrics_file import MetricsWriter
from megamoe.metrics.progress_bar import Progress
from megamoe.metrics.tensorboard import TensorBoardSink

_PICTURES = 8


class LeftOutShard(NamedTuple):
    """A shard that is not read any more: samples that it counts for in the order, why, and the ranks that met it."""

    samples: int
    reason: str
    ranks: list[int]


class RunRecords:
    """All records of a run. Rank 0 writes the shared ones; each loading rank writes its own audit and losses.

    Args:
        config: The resolved config.
        rank: This rank.
        resume_step: Last step whose effect is in the weights; None for a new run.
        tokenizer: Turns token ids of a batch back into captions.
    """

    def __init__(self, config: Config, rank: int, resume_step: int | None, tokenizer: Tokenizer):
        run = config.run.folder
        self._config, self._tokenizer, self._rank = config, tokenizer, rank
        self._metrics: MetricsWriter | None = None
        self._board: TensorBoardSink | None = None
        self._progress: Progress | None = None
        if rank == 0:
            self._metrics = MetricsWriter(run, resume_step)
            self._progress = Progress(config.train.steps, done=resume_step or 0)
            if config.metrics.tensorboard:
                self._board = TensorBoardSink(run / "tensorboard", resume_step, config.metrics.tensorboard_every)
        self._audit = AuditWriter(run, rank, config.data.audit)
        self._lost = run / "lost" / f"rank-{rank:05d}.jsonl"

    def write(self, record: Mapping[str, object], batch: StepBatch | None) -> None:
        """The record of a step that is done, and this rank's part of its batch."""
        step = record["step"]
        assert isinstance(step, int)
        if batch is not None:
            self._audit.write(step, batch.samples)
        if self._metrics is not None and self._progress is not None:
            self._metrics.write(record)
            self._progress.update(record)
        if self._board is not None:
            self._board.write(record)
            every = self._config.metrics.images_every
            if batch is not None and every and (step == 1 or step % every == 0):
                self._board.pictures(step, *_pictures(batch, self._tokenizer))

    def close(self) -> None:
        """Finish the progress line and the files."""
        for sink in (self._metrics, self._board, self._progress, self._audit):
            if sink is not None:
                sink.close()

    def write_lost(self, step: int, batch: StepBatch) -> None:
        """Name the samples of this rank's batch that could not be used."""
        if not batch.lost:
            return
        self._lost.parent.mkdir(parents=True, exist_ok=True)
        with self._lost.open("ab") as file:
            for sample in batch.lost:
                line = {"step": step, "slot": sample.slot, "id": sample.id, "reason": sample.reason}
                file.write(jsonl.to_line(line))

    def write_skipped(self, step: int, batch: StepBatch, what: str) -> None:
        """Name the samples of this rank's batch that no update came of; ``what``: why."""
        lost = [LostSample(slot, name, f"step skipped: {what}") for slot, name in batch.samples]
        self.write_lost(step, replace(batch, lost=lost))

    def write_quarantine(self, step: int, shards: Mapping[str, LeftOutShard]) -> None:
        """Name shards that are not read from ``step`` on."""
        if self._rank:
            return
        path = self._lost.with_name("shards.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            for name, shard in shards.items():
                line = {"step": step, "shard": name, **shard._asdict()}
                file.write(jsonl.to_line(line))
                print(f"megamoe: step {step}: going on without a shard: {shard.reason}", file=sys.stderr, flush=True)


def truncate_lost(run: Path, step: int) -> None:
    """Forget losses of steps after ``step``: these steps come again."""
    for path in sorted((run / "lost").glob("*.jsonl")):
        jsonl.truncate(path, step)


def _pictures(batch: StepBatch, tokenizer: Tokenizer) -> tuple[npt.NDArray[np.uint8], Sequence[str]]:
    """The first pictures of a batch, uint8 (N, H, W, 3), with their captions."""
    pixels, captions = [], []
    for images, text in batch.micro_batches:
        for images_I, text_3L in zip(images, text, strict=True):
            ids, segments, _ = PackedBatch.of(text_3L)
            for segment in range(1, int(segments.max()) + 1):
                words = ids[(segments == segment) & (ids != tokenizer.image_id) & (ids != tokenizer.eos_id)]
                pixels.append(images_I[segment - 1])
                captions.append(tokenizer.decode(words.tolist()))
                if len(pixels) == _PICTURES:
                    return torch.stack(pixels).numpy(), captions
    return torch.stack(pixels).numpy(), captions
