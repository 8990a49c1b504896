"""How far a :class:`.ShardDataset` has come, in one number that no rank or worker count is part of.

The order is one endless line of positions. From a position ``began`` on, R ranks take its positions in turn, one sample
each, and the W workers of a rank take the rank's samples in turn, one micro-batch each. So when every rank has taken k
micro-batches of b samples, the positions before ``began + k * b * R`` are those that were handed out, whatever R and W.
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
    """Which samples are those of worker ``worker`` of rank ``rank``; ``batch`` is the micro-batch."""

    rank: int
    ranks: int
    worker: int
    workers: int
    batch: int

    def position(self, began: int, taken: int) -> int:
        """Position of this reader's sample number ``taken``."""
        return began + self._of_rank(taken) * self.ranks + self.rank

    def done(self, began: int, taken: int) -> int:
        """The position before which, as far as this reader tells, all is handed out: equal on all ranks."""
        return began + self._of_rank(taken) * self.ranks

    def _of_rank(self, taken: int) -> int:
        """The number among its rank's samples of this reader's sample number ``taken``."""
        batches, within = divmod(taken, self.batch)
        return (batches * self.workers + self.worker) * self.batch + within


@dataclass
class Progress:
    """Where a reader is.

    Attributes:
        began: the position from which ``share`` counts.
        anchors: by source, a window that begins no later than what this reader still needs.
        quarantine: shard -> the samples it counts for in the order; not read any more.
        share: set when somebody begins to read.
        taken: samples of the share that were handed out or lost; after the last one rounded up to micro-batches.
        until: the pass ends where this epoch begins; None: not known yet, or endless.
        end: that position, once the pass has ended.
        lost: samples that could not be read, by cause.
        lost_before: as it was at the last whole micro-batch.
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
        """``taken`` in whole micro-batches: what comes behind has perhaps read samples that it did not hand out yet."""
        return self.taken if self.share is None else self.taken - self.taken % self.share.batch

    @property
    def position(self) -> int:
        """All samples before it are handed out, whoever has them."""
        if self.end is not None:
            return self.end
        return self.began if self.share is None else self.share.done(self.began, self.whole)

    def by(self, share: Share) -> Progress:
        """This progress, to be gone on with by ``share``."""
        if self.share == share:
            return self
        lost = Counter(self.lost_before) if share.worker == 0 else Counter[str]()  # or each worker would tell them again
        return Progress(self.position, self.anchors, dict(self.quarantine), share, lost=lost, lost_before=Counter(lost))

    def next_pass(self) -> Progress:
        """The pass after this one, which has ended."""
        assert self.end is not None
        return replace(self, began=self.end, taken=0, until=None, end=None)

    def to_state(self, order: Mapping[str, Any], anchors: tuple[Anchor, ...]) -> dict[str, Any]:
        """What :func:`from_state` reads. ``order`` is what the order depends on."""
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
    """Read what :meth:`Progress.to_state` gave to one or several readers, wherever in ``content`` it is.

    With several the earliest position counts, so nothing is left out. With ``share`` it must be the state of this very
    reader, which goes on where it was; without, the state is that of the whole data set, for any number of readers.

    Raises:
        DataError: there is none in it, or it belongs to another order or another reader.
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
                f"data state: of reader {_named(reader['share'])}, and this is {_named(share)}; "
                "load it into the data set, not into its loader, to go on with other ranks or workers"
            )
        began, taken, until = reader["began"], reader["taken"], reader["until"]
        if not all(type(number) is int and number >= 0 for number in (began, taken, until or 0)):
            raise TypeError("not a whole number")
        return Progress(began, anchors, quarantine, share, taken, until, None, lost, Counter(lost))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"data state: cannot be read ({error}); take another checkpoint") from error


def _find(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        if content.get("format") == FORMAT:
            yield content
            return
        if content.get("_steps_since_snapshot"):  # of a StatefulDataLoader: its workers' states are older than its own
            raise DataError("data state: is not of the last batch; leave snapshot_every_n_steps of the loader at 1")
        content = list(content.values())
    if isinstance(content, list | tuple):
        for each in content:
            yield from _find(each)


def _check_order(saved: Any, now: Mapping[str, Any]) -> None:
    saved = saved if isinstance(saved, dict) else {}
    for name, value in now.items():
        if saved.get(name) != value:
            raise DataError(
                f"data state: was saved with {name} {saved.get(name)}, and it is {value} now, so the order is another one; "
                "go on with what it was saved with"
            )


def _named(share: Any) -> str:
    rank, ranks, worker, workers, batch = share
    return f"{worker} of {workers} on rank {rank} of {ranks} with micro-batch {batch}"
