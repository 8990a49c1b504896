"""Account for every sample of a source: kept, dropped for a named cause, or lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.writing.records import Record, read_records
from megamoe.core.errors import DataError


@dataclass
class Account:
    """The counts of one output or of a whole set; ``read`` = ``kept`` + all of ``dropped`` + ``lost``.

    ``dropped`` counts the samples that the user's conditions exclude, by cause. ``lost`` names what could not be used, as
    (``shard#key``, reason); a damaged shard is one entry under its own name, since the number of samples in its
    unreadable part is unknown. ``kept_as`` divides the kept samples where a verb tells more about them. ``shards`` are the
    shards written, with their sizes in bytes; ``empty`` are those not written because they would have no sample.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lost: list[tuple[str, str]] = field(default_factory=list)
    kept_as: Counter[str] = field(default_factory=Counter)
    shards: dict[str, int] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)

    def lose(self, name: str, reason: str) -> None:
        """Count ``name`` as read and lost."""
        self.read += 1
        self.lost.append((name, reason))

    def add(self, other: Account) -> None:
        """Add the counts of ``other``."""
        self.read += other.read
        self.kept += other.kept
        self.dropped += other.dropped
        self.lost += other.lost
        self.kept_as += other.kept_as
        self.shards |= other.shards
        self.empty += other.empty

    def to_json(self) -> dict[str, Any]:
        """Return plain values; ``lost`` is a count, ``lost_samples`` the names."""
        assert self.read == self.kept + self.dropped.total() + len(self.lost), self
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "lost": len(self.lost),
            "lost_samples": [list(each) for each in self.lost],
            "kept_as": dict(self.kept_as),
            "shards": self.shards,
            "empty": self.empty,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Account:
        """Read what :meth:`to_json` returned."""
        return cls(
            content["read"],
            content["kept"],
            Counter(content["dropped"]),
            [(name, reason) for name, reason in content["lost_samples"]],
            Counter(content["kept_as"]),
            content["shards"],
            content["empty"],
        )

    def text(self) -> str:
        """Summarise in one line for people, with a second one if shards are empty."""
        parts = [f"{self.kept} of {self.read} samples kept in {len(self.shards)} shards{_counts(self.kept_as)}"]
        parts.append(f"{self.dropped.total()} dropped{_counts(self.dropped)}")
        parts.append(f"{len(self.lost)} lost")
        line = "; ".join(parts)
        if self.empty:
            line += f"\n{len(self.empty)} shards would be empty and were not written: {', '.join(self.empty)}"
        return line


def whole_records(shard: Path, label: str, account: Account) -> Iterator[Record]:
    """Yield the samples of ``shard`` and count them as read; losses go into ``account``.

    A damaged shard does not end the work: its samples up to the damage are good, and the rest is one loss.
    """
    try:
        for record in read_records(shard, lambda key, why: account.lose(f"{label}#{key}", why)):
            account.read += 1
            yield record
    except DataError as error:
        account.lose(label, str(error))


def _counts(counter: Counter[str]) -> str:
    return f" ({', '.join(f'{name} {count}' for name, count in sorted(counter.items()))})" if counter else ""
