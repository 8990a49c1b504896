"""The counts of a run, as one value: saved, restored, compared between ranks and recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace


@dataclass(frozen=True)
class Counters:
    """What has been counted up to a step. Every count is a sum over all ranks and equal on all of them.

    The value is immutable, so a checkpoint that is written in the background keeps the counts of its own step.

    Attributes:
        step: Steps done, including the skipped ones.
        tokens: Tokens of packed sequences trained on, without padding.
        samples: Image-text pairs trained on.
        lost: Samples that could not be used.
        lost_shard: Those of ``lost`` whose shard is in quarantine.
        drawn: Samples taken from the lanes of the data. Not saved: the data position of a checkpoint implies it.
        recomputed: Steps that were computed a second time.
        skipped: Steps without an update because loss or gradient norm was not finite, twice.
        skipped_in_a_row: Those of ``skipped`` since the last update.
        spikes: Steps without an update because of a loss spike, or because the run skips them after a rollback.
    """

    step: int = 0
    tokens: int = 0
    samples: int = 0
    lost: int = 0
    lost_shard: int = 0
    drawn: int = 0
    recomputed: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0

    @property
    def updates(self) -> int:
        """Optimizer updates made."""
        return self.step - self.skipped - self.spikes

    def plus(self, **amounts: int) -> Counters:
        """Return the counters with ``amounts`` added, by field name."""
        return replace(self, **{name: getattr(self, name) + amount for name, amount in amounts.items()})

    def to_json(self) -> dict[str, int]:
        """Return the counts that a checkpoint saves."""
        return {name: count for name, count in asdict(self).items() if name != "drawn"}

    @classmethod
    def from_json(cls, tree: Mapping[str, object], drawn: int = 0) -> Counters:
        """Restore what :meth:`to_json` returned; a count that an older checkpoint lacks is 0.

        Raises:
            TypeError: a count is missing, or is not a count.
        """
        counts: dict[str, int] = {}
        for name in (field.name for field in fields(cls) if field.name != "drawn"):
            count = tree.get(name, 0 if name in _ADDED_LATER else None)
            if type(count) is not int or count < 0:
                raise TypeError(f"{name} is {count!r}, not a count")
            counts[name] = count
        return cls(**counts, drawn=drawn)


_ADDED_LATER = ("lost_shard", "spikes")
