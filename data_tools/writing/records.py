"""Read and write whole samples: all members with their bytes.

Training needs a picture and a caption. The tools also keep everything else that lies beside them (metadata, further
captions, masks), so that no tool loses what another one made.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from megamoe.core.files import atomic_file
from megamoe.data.shards.index import groups
from megamoe.data.shards.tar import Member, open_for_walk, walk

OnLost = Callable[[str, str], None]


class Record(NamedTuple):
    """A sample in a tar: its key, and the bytes of its members by extension, in their order."""

    key: str
    members: dict[str, bytes]


def read_records(shard: Path, on_lost: OnLost) -> Iterator[Record]:
    """Yield all samples of ``shard`` in order, whether or not training could use them.

    ``on_lost(key, reason)`` is called for a further sample with the same key, which readers could not distinguish.

    Raises:
        DataError: the shard cannot be opened or is not an intact tar; the samples yielded before are good.
    """
    file, state = open_for_walk(shard)
    seen: set[str] = set()
    with file:
        for key, members in groups(walk(shard, file, state.st_size)):
            if key in seen:
                on_lost(key, "its key comes twice")
                continue
            seen.add(key)
            yield Record(key, {ext: _content(file, member) for ext, member in members.items()})


class ShardWriter:
    """Write one shard, which appears under its name when it is complete, or not at all.

    Use it in a ``with`` statement. The index of an earlier shard of that name is removed. The same records give the same
    bytes: times, owners and modes are constant.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0
        self.bytes = 0  # sum of the members' sizes

    def __enter__(self) -> ShardWriter:
        with ExitStack() as stack:
            self.path.with_name(f"{self.path.name}.idx").unlink(missing_ok=True)
            file = stack.enter_context(atomic_file(self.path))
            self._tar = stack.enter_context(tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, record: Record) -> None:
        """Append ``record``."""
        for ext, content in record.members.items():
            info = tarfile.TarInfo(f"{record.key}.{ext}")
            info.size = len(content)
            self._tar.addfile(info, io.BytesIO(content))
            self.bytes += len(content)
        self.samples += 1


def _content(file: BinaryIO, member: Member) -> bytes:
    here = file.tell()
    file.seek(member.offset)
    data = file.read(member.size)
    file.seek(here)
    return data
