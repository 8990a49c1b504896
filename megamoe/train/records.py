"""Write what people read while a run trains: metrics.jsonl, TensorBoard, the progress line, lost samples, audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megamoe.config import Config
from megamoe.core.log import say
from megamoe.core.packed_batch import PackedBatch
from megamoe.core.run_folder import RunFolder
from megamoe.data.loader.lane import LostSample
from megamoe.data.loader.step_loader import StepBatch
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.metrics import jsonl
from megamoe.metrics.audit import AuditWriter
from megamoe.metrics.metrics_file import MetricsWriter
from megamoe.metrics.progress_bar import Progress
from megamoe.metrics.step_record import StepRecord
from megamoe.metrics.tensorboard import TensorBoardSink
from megamoe.parallel.deepspeed.engine import StepResult
from megamoe.train.live_state import LiveState
from megamoe.train.totals import StepTotals

_PICTURES = 8


class QuarantinedShard(NamedTuple):
    """A shard that is not read any more.

    Attributes:
        samples: Samples that it counts for in the order of samples.
        reason: Why it cannot be used.
        ranks: Ranks that could not use it.
    """

    samples: int
    reason: str
    ranks: list[int]


class RunRecords:
    """Write all records of a run. Rank 0 writes the shared ones; each loading rank writes its own audit and lost samples.

    Args:
        config: The resolved config. Sections ``run``, ``train``, ``data`` and ``metrics`` have a say.
        rank: This rank.
        resume_step: Last step whose effect is in the weights; None for a new run.
        tokenizer: Turns token ids of a batch back into captions.
    """

    def __init__(self, config: Config, rank: int, resume_step: int | None, tokenizer: Tokenizer):
        run, settings = config.run.folder, config.metrics
        self._settings, self._tokenizer, self._rank = settings, tokenizer, rank
        self._metrics: MetricsWriter | None = None
        self._board: TensorBoardSink | None = None
        self._progress: Progress | None = None
        if rank == 0:
            self._metrics = MetricsWriter(run, resume_step)
            self._progress = Progress(config.train.steps, done=resume_step or 0)
            if settings.tensorboard:
                self._board = TensorBoardSink(RunFolder(run).tensorboard, resume_step, settings.tensorboard_every)
        self._audit = AuditWriter(run, rank, config.data.audit)
        self._lost = RunFolder(run).lost_of(rank)

    def write(self, record: StepRecord, batch: StepBatch | None) -> None:
        """Write the record of a step.

        Args:
            record: Its record.
            batch: This rank's part of its batch; None if the step was not applied, or the rank loads no data.
        """
        step = record["step"]
        if batch is not None:
            self._audit.write(step, batch.samples)
        if self._metrics is not None and self._progress is not None:
            self._metrics.write(record)
            self._progress.update(record)
        if self._board is not None:
            self._board.write(record)
            every = self._settings.images_every
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

    def write_skipped(self, step: int, batch: StepBatch, reason: str) -> None:
        """Name the samples of this rank's batch whose step was skipped, and say why."""
        lost = [LostSample(slot, name, f"step skipped: {reason}") for slot, name in batch.samples]
        self.write_lost(step, replace(batch, lost=lost))

    def write_quarantine(self, step: int, shards: Mapping[str, QuarantinedShard]) -> None:
        """Name the shards that are in quarantine from ``step`` on."""
        if self._rank:
            return
        path = self._lost.with_name("shards.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            for name, shard in shards.items():
                line = {"step": step, "shard": name, **shard._asdict()}
                file.write(jsonl.to_line(line))
                say(f"step {step}: going on without a shard: {shard.reason}")


def step_record(
    state: LiveState,
    result: StepResult,
    totals: StepTotals,
    batch: StepBatch | None,
    *,
    lr: float,
    seconds: float,
    flops: float,
) -> StepRecord:
    """Put together the record of the step that was just counted.

    Args:
        state: The run after the step.
        result: What was computed.
        totals: Sums over the global batch.
        batch: This rank's part of it; None for a rank that loads no data.
        lr: Learning rate of the step.
        seconds: Duration of the step.
        flops: Model FLOPs of the step.
    """
    counters, position = state.counters, state.position
    return {
        "step": counters.step,
        "loss": result.loss,
        "lm_loss": result.lm_loss,
        "aux_loss": result.aux_loss,
        "z_loss": result.z_loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens": counters.tokens,
        "samples": counters.samples,
        "lost": counters.lost,
        "bad_shards": len(position.quarantine) if position is not None else 0,
        "truncated": totals.truncated,
        "recomputed": counters.recomputed,
        "skipped": counters.skipped,
        "spikes": counters.spikes,
        "rolled_back": state.guard.rollbacks,
        "step_seconds": seconds,
        "data_seconds": batch.wait_seconds if batch is not None else 0.0,
        "tokens_per_second": totals.tokens / seconds,
        "model_flops_per_second": flops / seconds,
        "world_size": dist.get_world_size(),
        "load": result.load,
        "sources": totals.sources,
        "reading": totals.reading,
    }


def truncate_lost(run: Path, step: int) -> None:
    """Drop the lost samples of steps after ``step``, which come again."""
    for path in sorted(RunFolder(run).lost.glob("*.jsonl")):
        jsonl.truncate(path, step)


def _pictures(batch: StepBatch, tokenizer: Tokenizer) -> tuple[npt.NDArray[np.uint8], Sequence[str]]:
    """Return the first pictures of a batch, uint8 (N, H, W, 3), with their captions."""
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
