"""Read parquet tables: a shard reads only its own rows, from the row groups that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from data_tools.sources.columns import Columns, row_item
from data_tools.sources.item import Item
from megamoe.core.errors import DataError

_BATCH = 1024  # rows in memory at a time; they may contain pictures


@dataclass(frozen=True)
class ParquetChunk:
    """``samples`` rows of a parquet table from row ``first`` (from 0) on."""

    path: Path
    columns: Columns
    first: int
    samples: int

    def items(self) -> Iterator[Item]:
        """Read the rows.

        Raises:
            DataError: the file is damaged.
        """
        try:
            yield from self._items()
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(self.path, error) from error

    def _items(self) -> Iterator[Item]:
        with pq.ParquetFile(self.path) as table:
            groups: list[int] = []
            skip = at = 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if at < self.first + self.samples and at + rows > self.first:
                    if not groups:
                        skip = self.first - at
                    groups.append(group)
                at += rows
            number = self.first
            for batch in table.iter_batches(batch_size=_BATCH, row_groups=groups):
                wanted = batch.slice(skip, self.first + self.samples - number)
                skip = max(0, skip - batch.num_rows)
                for row in wanted.to_pylist():
                    yield row_item(row, f"{self.path.name} row {number + 1}", self.columns)
                    number += 1
                if number == self.first + self.samples:
                    return


def parquet_header(path: Path) -> tuple[str, ...]:
    """Read the names of the columns.

    Raises:
        DataError: the file is not parquet.
    """
    try:
        return tuple(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def cut_parquet(path: Path, columns: Columns, shard_size: int) -> Iterator[ParquetChunk]:
    """Yield one chunk per shard."""
    with pq.ParquetFile(path) as table:
        rows = table.metadata.num_rows
    for first in range(0, rows, shard_size):
        yield ParquetChunk(path, columns, first, min(shard_size, rows - first))


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: cannot be read as parquet ({' '.join(str(error).split())}); check its format or copy it again"
    )
