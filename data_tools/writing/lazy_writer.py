"""Write a shard that is created with its first sample."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from data_tools.writing.account import Account
from data_tools.writing.records import Record, ShardWriter


class LazyWriter:
    """Write a shard like :class:`ShardWriter`, but without samples create no file, since readers refuse an empty tar.

    If ``path`` is None, samples are only counted, for a dry run.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.samples = 0
        self._writer: ShardWriter | None = None
        self._stack = ExitStack()

    def __enter__(self) -> LazyWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, record: Record) -> None:
        """Append ``record``."""
        self.samples += 1
        if self.path is None:
            return
        if self._writer is None:
            self._writer = self._stack.enter_context(ShardWriter(self.path))
        self._writer.write(record)

    def count(self, account: Account, name: str) -> None:
        """Add the shard, which must be closed, to ``account`` under ``name``."""
        account.kept += self.samples
        if self.samples:
            account.shards[name] = 0 if self.path is None else self.path.stat().st_size
        else:
            account.empty.append(name)
