"""Get the next batch on all ranks: if a shard cannot be used, either all ranks continue without it or none does."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from megamoe.config import Config
from megamoe.config.data import DataConfig
from megamoe.core.errors import DataError
from megamoe.data.loader.step_loader import StepBatch, StepLoader
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import BadShard, DataSet
from megamoe.data.shards.from_config import open_cache
from megamoe.parallel.layout import Layout
from megamoe.train.records import QuarantinedShard, RunRecords
from megamoe.train.stop_request import StopRequest
from megamoe.train.totals import StepTotals, step_totals
from megamoe.train.watchdog import Watchdog

_T = TypeVar("_T")


class _Failure(NamedTuple):
    """Why a rank has no batch.

    Attributes:
        shard: The shard that cannot be used; None if the fault is larger than a shard.
        reason: What is wrong, in words.
        samples: Samples in the shard; -1 if the rank cannot say.
    """

    shard: str | None
    reason: str
    samples: int


def open_loader(config: Config, layout: Layout, tokenizer: Tokenizer, data: DataSet) -> StepLoader:
    """Open this rank's part of the training data at its beginning."""
    return StepLoader(
        config.data,
        vision=config.model.vision,
        tokenizer=tokenizer,
        dataset=data,
        cache=open_cache(config.data),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        dp_rank=layout.data_rank(dist.get_rank()),
        dp_size=layout.data,
    )


def next_batch(
    loader: StepLoader | None,
    data: DataConfig,
    records: RunRecords,
    step: int,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
) -> tuple[StepBatch | None, StepTotals]:
    """Get this rank's part of the next step, and the sums over all ranks. All ranks call, and all return or raise.

    Args:
        loader: This rank's loader; None for a rank that loads no data.
        data: Section ``data`` of the config.
        records: Where shards that cannot be used are named.
        step: The step to come.
        device: Where collectives take place.
        stop: Whether this rank was asked to stop.
        watchdog: Learns what this rank waits for.

    Raises:
        DataError: on all ranks, for what one of them met: a shard that cannot be used while ``data.bad_shards`` says to
            stop, more than ``data.max_bad_shards`` of them, or too many bad samples in a row.
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
        shards = _unusable(failures, loader)
        if loader is not None and before is not None:
            loader.quarantine(before, {name: shard.samples for name, shard in shards.items()})
        records.write_quarantine(step, shards)
        _check_limit(loader, data.max_bad_shards)


def _unusable(failures: list[_Failure | None], loader: StepLoader | None) -> dict[str, QuarantinedShard]:
    """Return the shards that some rank cannot use.

    Each counts for as many samples as any rank knows or can find out, and for none if no rank can say. So the order of
    samples depends on who can read the shard, but not on how far each rank has come with it.
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
        shard: QuarantinedShard(
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
            "in the run's folder); repair them or raise the limit"
        )


def _gather(mine: _T) -> list[_T]:
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
