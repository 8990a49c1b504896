"""Keep the data position of a run: small, independent of ranks and workers, part of every checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megamoe.core.errors import DataError
from megamoe.data.order.sample_order import Anchor


@dataclass(frozen=True)
class DataState:
    """The position of each lane, and what is needed to resume there without reading anything before it.

    Attributes:
        cursors: lane -> number of its next sample.
        anchors: for each source the earliest window that any lane still needs.
        quarantine: shard that is no longer read -> the samples it counts for in the order.
    """

    cursors: Mapping[int, int]
    anchors: tuple[Anchor, ...]
    quarantine: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads, as lists and numbers. The state must hold all lanes."""
        return {
            "cursors": [self.cursors[lane] for lane in range(len(self.cursors))],
            "anchors": [list(anchor) for anchor in self.anchors],
            "quarantine": dict(self.quarantine),
        }

    @classmethod
    def from_json(cls, content: Any, source: str) -> DataState:
        """Read what :meth:`to_json` wrote; ``source`` names it in errors.

        Raises:
            DataError: it does not have that form.
        """
        try:
            cursors, anchors, quarantine = content["cursors"], content["anchors"], content["quarantine"]
            numbers = [*cursors, *(n for anchor in anchors for n in anchor), *quarantine.values()]
            if not all(type(n) is int and n >= 0 for n in numbers) or not all(type(name) is str for name in quarantine):
                raise TypeError("not a whole number")
            return cls(dict(enumerate(cursors)), tuple(Anchor(*anchor) for anchor in anchors), quarantine)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{source}: the data position cannot be read ({error}); use another checkpoint") from error


def joined(states: Iterable[DataState | None]) -> DataState | None:
    """Join the states of the ranks into that of all lanes. A rank without lanes gives None; so do no lanes at all."""
    carried = [state for state in states if state is not None]
    if not carried:
        return None
    cursors = {lane: cursor for state in carried for lane, cursor in state.cursors.items()}
    assert sorted(cursors) == list(range(len(cursors))), "a lane is carried by no rank"
    return DataState(cursors, earliest(state.anchors for state in carried), carried[0].quarantine)


def earliest(anchors: Iterable[tuple[Anchor, ...]]) -> tuple[Anchor, ...]:
    """Return, for each source, the earliest of the anchors that several readers report."""
    return tuple(min(each, key=lambda anchor: anchor.start) for each in zip(*anchors, strict=True))
