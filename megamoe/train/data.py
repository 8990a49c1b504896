"""The next batch of a step, agreed on by all ranks: when a shard cannot be used, all go on without it, or none does."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from megamoe.config.schema import DataConfig
from megamoe.data.catalog import BadShard
from megamoe.data.loader import StepBatch, StepLoader
from megamoe.data.order import Anchor
from megamoe.data.state import DataState, earliest
from megamoe.errors import DataError
from megamoe.train.records import RunRecords
from megamoe.train.stop import StopRequest
from megamoe.train.totals import StepTotals, step_totals
from megamoe.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


def next_batch(
    loader: StepLoader | None,
    data: DataConfig,
    records: RunRecords,
    step: int,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
) -> tuple[StepBatch | None, StepTotals]:
    """This rank's part of the next step, and the counts over all ranks. All ranks call.

    Raises:
        BadShard: a shard cannot be used and ``data.bad_shards`` says to stop.
        DataError: more than ``data.max_bad_shards`` shards cannot be used, or too many samples in a row.
    """
    while True:
        watchdog.enter("waits for its part of the data", step)
        before = loader.state if loader is not None else None
        batch, bad = None, None
        try:
            batch = next(loader) if loader is not None else None
        except BadShard as error:
            if data.bad_shards == "stop":
                raise
            bad = error
        watchdog.enter("waits for the other ranks to have their part of the data", step)
        totals = step_totals(batch, bad is not None, stop.asked, device)
        if not totals.bad_shards:
            return batch, totals
        shards = _agree(loader, bad)
        if loader is not None and before is not None:
            loader.set_aside(before, {shard: max(0, count) for shard, (count, _) in shards.items()})
            _check_limit(loader.state, data.max_bad_shards)
        records.write_quarantine(step, {shard: (max(0, count), why) for shard, (count, why) in shards.items()})


def whole_state(loader: StepLoader | None, lanes: int) -> DataState:
    """The state of all ``lanes``, put together from the ranks that carry them. All ranks call."""
    everyone: list[DataState | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, loader.state if loader is not None else None)
    states = [state for state in everyone if state is not None]
    cursors = {lane: cursor for state in states for lane, cursor in state.cursors.items()}
    assert sorted(cursors) == list(range(lanes))
    anchors: tuple[Anchor, ...] = earliest(state.anchors for state in states)
    return DataState(cursors, anchors, states[0].quarantine)


def _agree(loader: StepLoader | None, bad: BadShard | None) -> dict[str, tuple[int, str]]:
    """Shards that some rank cannot use: samples they count for if any rank knows (-1 if none does), and why."""
    named: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(named, (bad.shard, str(bad)) if bad is not None else None)
    reasons = {shard: why for shard, why in reversed([name for name in named if name is not None])}
    known = {shard: loader.known_count(shard) for shard in reasons} if loader is not None else {}
    if bad is not None:
        known[bad.shard] = max(known.get(bad.shard, -1), bad.count)
    counts: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(counts, known)
    return {shard: (max(each.get(shard, -1) for each in counts), reasons[shard]) for shard in sorted(reasons)}


def _check_limit(state: DataState, limit: int) -> None:
    if len(state.quarantine) > limit:
        names = ", ".join(sorted(state.quarantine))
        raise DataError(
            f"data.max_bad_shards {limit}: {len(state.quarantine)} shards cannot be used ({names}); mend them or raise it"
        )
