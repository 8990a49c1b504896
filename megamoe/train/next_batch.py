"""The next batch of a step, agreed on by all ranks: when a shard cannot be used, all go on without it, or none does."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from megamoe.config.schema import DataConfig
from megamoe.core.errors import DataError
from megamoe.data.loader.step_loader import StepBatch, StepLoader
from megamoe.data.shards.catalog import BadShard
from megamoe.train.records import LeftOutShard, RunRecords
from megamoe.train.stop_request import StopRequest
from megamoe.train.totals import StepTotals, step_totals
from megamoe.train.watchdog import Watchdog

_T = TypeVar("_T")


class _Failure(NamedTuple):
    """Why a rank has no batch. ``shard`` is None if it is more than a shard that cannot be used."""

    shard: str | None
    reason: str
    samples: int


def next_batch(
    loader: StepLoader | None,
    data: DataConfig,
    records: RunRecords,
    step: int,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
) -> tuple[StepBatch | None, StepTotals]:
    """This rank's part of the next step, and the counts over all ranks. All ranks call, and all come to the same end.

    Raises:
        DataError: on all ranks, what one of them met: a shard that cannot be used while ``data.bad_shards`` says to stop,
            more than ``data.max_bad_shards`` of them, or too many samples in a row.
    """
    sources = [source.name or str(number) for number, source in enumerate(data.train)]
    while True:
        watchdog.enter("waits for its part of the data", step)
        before = loader.state if loader is not None else None
        batch, mine = None, None
        try:
            batch = next(loader) if loader is not None else None
        except BadShard as error:
            mine = _Failure(error.shard, str(error), error.count)
        except DataError as error:
            mine = _Failure(None, str(error), -1)
        watchdog.enter("waits for the other ranks to have their part of the data", step)
        totals = step_totals(batch, mine is not None, stop.asked, sources, device)
        if not totals.failed:
            return batch, totals
        failures = _gather(mine)
        for failure in failures:
            if failure is not None and (failure.shard is None or data.bad_shards == "stop"):
                raise DataError(failure.reason)
        shards = _left_out(failures, loader)
        if loader is not None and before is not None:
            loader.quarantine(before, {name: shard.samples for name, shard in shards.items()})
        records.write_quarantine(step, shards)
        _check_limit(loader, data.max_bad_shards)


def _left_out(failures: list[_Failure | None], loader: StepLoader | None) -> dict[str, LeftOutShard]:
    """The shards that some rank cannot use.

    Each counts for as many samples as any rank knows or can find out, so that the order of samples depends on who can
    read the shard but not on how far each rank has come with it; for none if nobody can say.
    """
    ranks: dict[str, list[int]] = {}
    for rank, failure in enumerate(failures):
        if failure is not None and failure.shard is not None:
            ranks.setdefault(failure.shard, []).append(rank)
    known: dict[str, int] = {}
    mine = failures[dist.get_rank()]
    if loader is not None:
        known = {shard: loader.count(shard, fetch=mine is None or mine.shard != shard) for shard in ranks}
    if mine is not None and mine.shard is not None:
        known[mine.shard] = max(known.get(mine.shard, -1), mine.samples)
    counts = _gather(known)
    return {
        shard: LeftOutShard(
            max(0, *(each.get(shard, -1) for each in counts)),
            next(failure.reason for failure in failures if failure is not None and failure.shard == shard),
            ranks[shard],
        )
        for shard in sorted(ranks)
    }


def _check_limit(loader: StepLoader | None, limit: int) -> None:
    everyone = _gather(sorted(loader.state.quarantine) if loader is not None else [])
    names = everyone[0]  # the same on all ranks that load
    if len(names) > limit:
        raise DataError(
            f"data.max_bad_shards {limit}: {len(names)} shards cannot be used ({', '.join(names)}; see lost/shards.jsonl "
            "in the run's folder); mend them or raise it"
        )


def _gather(mine: _T) -> list[_T]:
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
