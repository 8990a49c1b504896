"""Count a step over all ranks. Decisions are taken from these sums, so all ranks take the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megamoe.core.errors import DataError
from megamoe.core.packed_batch import PackedBatch
from megamoe.data.loader.step_loader import StepBatch

# Among fewer samples than this, a single bad one would already be a large share.
_SAMPLES_BEFORE_LIMIT = 1000

_OF_STEP = ("targets", "tokens", "samples", "lost", "drawn", "lost_shard", "truncated", "stops", "failed")
_OF_SOURCE = ("samples", "bytes", "decode_seconds", "lost_image", "lost_caption", "lost_incomplete", "lost_shard")
_OF_READING = ("downloads", "cache_hits", "retries", "received", "seconds")


@dataclass(frozen=True)
class StepTotals:
    """Sums over the global batch of a step.

    Attributes:
        targets: Caption tokens with a label.
        tokens: Tokens without padding.
        samples: Samples trained on.
        lost: Samples that could not be used.
        drawn: Samples by which the lanes have moved on. An incomplete sample has no place in a lane and does not count.
        lost_shard: Those of ``lost`` whose shard is in quarantine.
        truncated: Captions cut to the sequence length.
        stops: Ranks that were asked to stop.
        failed: Ranks that have no batch. If there are any, the other sums mean nothing.
        sources: Source -> what it gave (:meth:`megamoe.data.loader.lane.LanePacker.next_sequence`).
        reading: What reading cost (:class:`megamoe.data.loader.worker.WorkerItem`).
    """

    targets: int
    tokens: int
    samples: int
    lost: int
    drawn: int
    lost_shard: int
    truncated: int
    stops: int
    failed: int
    sources: Mapping[str, Mapping[str, float]]
    reading: Mapping[str, float]


def step_totals(
    batch: StepBatch | None, failed: bool, stop: bool, sources: Sequence[str], device: torch.device
) -> StepTotals:
    """Sum the counts of all ranks. All ranks call, with the same ``sources``.

    Args:
        batch: This rank's part of the step; None for a rank that loads no data, or has failed.
        failed: Whether this rank has failed to get its part.
        stop: Whether this rank was asked to stop.
        sources: Names of the data sources.
        device: Where the collective takes place.
    """
    pairs = [(number, what) for number in range(len(sources)) for what in _OF_SOURCE]
    mine: list[float] = [0] * (len(_OF_STEP) + len(pairs) + len(_OF_READING))
    if batch is not None:
        tokens = sum(PackedBatch.of(text).tokens for _, text in batch.micro_batches)
        shard = sum(count for (_, what), count in batch.counters.items() if what == "lost_shard")
        samples, lost = len(batch.samples), len(batch.lost)
        drawn = samples + lost - sum(count for (_, what), count in batch.counters.items() if what == "lost_incomplete")
        mine = [batch.targets, tokens, samples, lost, drawn, shard, batch.truncated, 0, 0]
        mine += [*(batch.counters[pair] for pair in pairs), *(batch.reading[what] for what in _OF_READING)]
    mine[len(_OF_STEP) - 2 : len(_OF_STEP)] = [stop, failed]
    # One collective for all, since each costs a round over the network. Counts are exact up to 2^53.
    sums = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    counts = iter(round(value, 6) if value % 1 else int(value) for value in sums.tolist())
    step = {what: int(next(counts)) for what in _OF_STEP}
    given = {name: {what: next(counts) for what in _OF_SOURCE} for name in sources}
    return StepTotals(**step, sources=given, reading=dict(zip(_OF_READING, counts, strict=True)))


def check_losses(lost: int, samples: int, max_corrupt: float) -> None:
    """Stop the run when too many samples could not be used.

    Raises:
        DataError: ``lost`` is more than ``max_corrupt`` of all samples read (of at least 1000).
    """
    read = max(lost + samples, _SAMPLES_BEFORE_LIMIT)
    if lost > max_corrupt * read:
        raise DataError(
            f"data.max_corrupt {max_corrupt:g}: {lost} of {lost + samples} samples could not be used (named in the "
            f"run's folder lost/); mend the shards or raise the limit"
        )
