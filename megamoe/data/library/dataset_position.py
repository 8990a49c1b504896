"""Record how far a :class:`.ShardDataset` has come, in one number that does not depend on ranks or workers.

The order is one endless line of positions. From a position ``began`` on, R ranks take its positions in turn, one sample
each, and the W workers of a rank take the rank's samples in turn, one micro-batch each. So when every rank has taken k
micro-batches of b samples, exactly the positions before ``began + k * b * R`` were handed out, whatever R and W are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from megamoe.core.errors import DataError
from megamoe.data.order.position import DataState, earliest
from megamoe.data.order.sample_order import Anchor

FORMAT = "megamoe.data.ShardDataset/1"


class Share(NamedTuple):
    """Name one reader and so its samples: worker ``worker`` of rank ``rank``; ``batch`` is the micro-batch."""

    rank: int
    ranks: int
    worker: int
    workers: int
    batch: int

    def position(self, began: int, taken: int) -> int:
        """Return the position of this reader's sample number ``taken``."""
        return began + self._of_rank(taken) * self.ranks + self.rank

    def done(self, began: int, taken: int) -> int:
        """Return the position before which, judging by this reader, all samples are handed out. Equal on all ranks."""
        return began + self._of_rank(taken) * self.ranks

    def _of_rank(self, taken: int) -> int:
        """Return which of its rank's samples this reader's sample number ``taken`` is."""
        batches, within = divmod(taken, self.batch)
        return (batches * self.workers + self.worker) * self.batch + within


@dataclass
class Progress:
    """The position of a reader.

    Attributes:
        began: the position from which ``share`` counts.
        anchors: by source, a window that begins no later than what this reader still needs.
        quarantine: quarantined shard -> the samples it counts for in the order.
        share: which reader this is; None until reading begins.
        taken: samples of the share that were handed out or lost; after the last one rounded up to micro-batches.
        until: the epoch at whose beginning the pass ends; None: not known yet, or endless.
        end: the position at which the pass ended; None while it runs.
        lost: samples that could not be read, by cause.
        lost_before: ``lost`` at the last whole micro-batch.
    """

    began: int
    anchors: tuple[Anchor, ...]
    quarantine: dict[str, int] = field(default_factory=dict)
    share: Share | None = None
    taken: int = 0
    until: int | None = None
    end: int | None = None
    lost: Counter[str] = field(default_factory=Counter)
    lost_before: Counter[str] = field(default_factory=Counter)

    @property
    def whole(self) -> int:
        """``taken`` rounded down to micro-batches: samples of a partial one may be read but not handed out yet."""
        return self.taken if self.share is None else self.taken - self.taken % self.share.batch

    @property
    def position(self) -> int:
        """The position before which all samples are handed out, by any reader."""
        if self.end is not None:
            return self.end
        return self.began if self.share is None else self.share.done(self.began, self.whole)

    def by(self, share: Share) -> Progress:
        """Return this progress for ``share`` to continue."""
        if self.share == share:
            return self
        # Else each worker would report them again.
        lost = Counter(self.lost_before) if share.worker == 0 else Counter[str]()
        return Progress(self.position, self.anchors, dict(self.quarantine), share, lost=lost, lost_before=Counter(lost))

    def next_pass(self) -> Progress:
        """Return the start of the pass after this one, which has ended."""
        assert self.end is not None
        return replace(self, began=self.end, taken=0, until=None, end=None)

    def to_state(self, order: Mapping[str, Any], anchors: tuple[Anchor, ...]) -> dict[str, Any]:
        """Return what :func:`from_state` reads. ``order`` holds the settings that the order depends on."""
        assert self.share is not None
        return {
            "format": FORMAT,
            "order": dict(order),
            "data": DataState({0: self.position}, anchors, dict(self.quarantine)).to_json(),
            "lost": dict(self.lost_before),
            "reader": {
                "share": list(self.share),
                "began": self.began,
                "taken": self.whole,
                "until": self.until,
            },
        }


def from_state(content: Any, order: Mapping[str, Any], share: Share | None) -> Progress:
    """Find the states of one or several readers anywhere in ``content`` and return the progress to resume from.

    Of several states the earliest position counts, so no sample is missed. With ``share``, the state must belong to
    exactly this reader, which resumes where it was. Without, the result stands for the whole data set and any number of
    readers.

    Raises:
        DataError: it holds no state, or one of another order or another reader.
    """
    states = list(_find(content))
    if not states:
        raise DataError("data state: holds no state of a ShardDataset; give what state_dict() returned")
    read = [DataState.from_json(state.get("data"), "data state") for state in states]
    for state in states:
        _check_order(state.get("order"), order)
    quarantine = {shard: count for each in read for shard, count in each.quarantine.items()}
    anchors = earliest(each.anchors for each in read)
    try:
        lost = sum((Counter(state["lost"]) for state in states), Counter[str]())
        if share is None:
            return Progress(
                min(each.cursors[0] for each in read), anchors, quarantine, lost=lost, lost_before=Counter(lost)
            )
        reader = states[0]["reader"]
        if tuple(reader["share"]) != share:
            raise DataError(
                f"data state: belongs to reader {_named(reader['share'])}, but this is {_named(share)}; "
                "to resume with other ranks or workers, load it into the data set, not into its loader"
            )
        began, taken, until = reader["began"], reader["taken"], reader["until"]
        if not all(type(number) is int and number >= 0 for number in (began, taken, until or 0)):
            raise TypeError("not a whole number")
        return Progress(began, anchors, quarantine, share, taken, until, None, lost, Counter(lost))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"data state: cannot be read ({error}); use another checkpoint") from error


def _find(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        if content.get("format") == FORMAT:
            yield content
            return
        if content.get("_steps_since_snapshot"):  # of a StatefulDataLoader whose workers' states are older than its own
            raise DataError("data state: is older than the last batch; set snapshot_every_n_steps of the loader to 1")
        content = list(content.values())
    if isinstance(content, list | tuple):
        for each in content:
            yield from _find(each)


def _check_order(saved: Any, now: Mapping[str, Any]) -> None:
    saved = saved if isinstance(saved, dict) else {}
    for name, value in now.items():
        if saved.get(name) != value:
            raise DataError(
                f"data state: was saved with {name} {saved.get(name)}, which is now {value}, so the order differs; "
                "resume with what it was saved with"
            )


def _named(share: Any) -> str:
    rank, ranks, worker, workers, batch = share
    return f"{worker} of {workers} on rank {rank} of {ranks} with micro-batch {batch}"
