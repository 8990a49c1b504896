"""Manage the folder that a verb fills with shards: its request, its finished work, and its result.

``OUT/<verb>.json`` holds the request from the start and the result at the end. Until then ``OUT/.<verb>/`` holds one note
per finished job, so that a killed run resumes. The same request finds its work again. Any other request is refused, and
so is a folder with shards that this verb did not make.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from data_tools.distribute.jobs import map_jobs
from data_tools.writing.account import Account
from megamoe.core.errors import DataError
from megamoe.core.files import atomic_file
from megamoe.data.shards.expand import local_shards
from megamoe.data.shards.labels import shard_labels


class Source(NamedTuple):
    """The shards that a verb reads, their names in messages, and a digest of their paths, sizes and times."""

    shards: list[Path]
    labels: list[str]
    state: str


class NamedJob(Protocol):
    """A job whose ``name`` is unique in its request and valid as a file name."""

    @property
    def name(self) -> str: ...


Job = TypeVar("Job", bound=NamedJob)


def open_source(spec: str) -> Source:
    """Open the shards that ``spec`` names.

    Raises:
        DataError: as for :func:`megamoe.data.shards.expand.local_shards`, or a shard cannot be read.
    """
    shards = local_shards([spec])
    digest = hashlib.sha256()
    for shard in shards:
        try:
            state = shard.stat()
        except OSError as error:
            raise DataError(f"shard {shard}: cannot be read ({error.strerror}); check the path and its rights") from error
        digest.update(os.fsencode(f"{os.path.realpath(shard)}\0{state.st_size}\0{state.st_mtime_ns}\n"))
    return Source(shards, shard_labels([str(shard) for shard in shards]), digest.hexdigest())


def output_names(source: Source) -> list[str]:
    """Return the names of the output shards, one per source shard and equal to it.

    Raises:
        DataError: two source shards have the same file name.
    """
    names: list[str] = []
    for shard in source.shards:
        names.append(shard.name if shard.suffix == ".tar" else f"{shard.name}.tar")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"shards: two are called {twice} and would become one output; write each folder to its own OUT")
    return names


class OutFolder:
    """The folder ``out`` for one request of ``verb``.

    Args:
        out: the folder; created if it does not exist.
        verb: the name of its files.
        request: everything that the output depends on, as JSON values.
        parts: subfolders of ``out`` that receive the shards; default ``out`` itself.
        dry_run: check the folder, but write nothing into it.

    Raises:
        DataError: the folder belongs to another request, or holds shards but no request.
    """

    def __init__(
        self, out: Path, verb: str, request: dict[str, Any], parts: Sequence[str] = ("",), dry_run: bool = False
    ) -> None:
        self.path = out
        self.dry_run = dry_run
        self.notes = out / f".{verb}"
        self._file = out / f"{verb}.json"
        self._request = json.loads(json.dumps(request))
        self._parts = parts
        self._result = self._claim()

    def finished(self) -> Account | None:
        """Return the result of a completed run, if everything it wrote still exists."""
        if self._result is None:
            return None
        account = Account.from_json(self._result)
        return account if _are_there(self.path, account.shards) else None

    def refuse_others(self, shards: Collection[str]) -> None:
        """Raise :class:`DataError` if there is a shard besides ``shards`` (paths below the folder)."""
        for part in self._parts:
            for path in sorted((self.path / part).glob("*.tar")):
                if str(path.relative_to(self.path)) not in shards:
                    raise DataError(f"{path}: not made by this request; remove it or write to an empty folder")

    def target(self, name: str) -> Path | None:
        """Return the path of the shard ``name`` (relative to the folder); None in a dry run."""
        return None if self.dry_run else self.path / name

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give a folder for intermediate files: that of the notes, which survive a kill; in a dry run a temporary one."""
        if not self.dry_run:
            yield self.notes
            return
        with tempfile.TemporaryDirectory(prefix="megamoe-") as temporary:
            yield Path(temporary)

    def do(self, function: Callable[[Job], Account], jobs: Sequence[Job], *, label: str, processes: int | None) -> Account:
        """Do the jobs that have no note yet, note each, and return the sum of all accounts in the order of ``jobs``."""
        done = {job.name: account for job in jobs if (account := self._noted(job.name)) is not None}
        left = [job for job in jobs if job.name not in done]
        work = function if self.dry_run else partial(_do_and_note, function, self.notes)
        for job, account in map_jobs(work, left, label=label, processes=processes):
            done[job.name] = account
        total = Account()
        for job in jobs:
            total.add(done[job.name])
        return total

    def close(self, result: Account) -> None:
        """Write the result and remove the notes."""
        if not self.dry_run:
            self._write({"request": self._request, "result": result.to_json()})
            shutil.rmtree(self.notes, ignore_errors=True)

    def _claim(self) -> dict[str, Any] | None:
        if not self._file.exists():
            self.refuse_others(())
            if not self.dry_run:
                self._write({"request": self._request})
            return None
        try:
            content = json.loads(self._file.read_bytes())
            saved, result = content["request"], content.get("result")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._file}: damaged; remove {self.path} and start again") from error
        if saved != self._request:
            field = next(name for name in [*self._request, *saved] if saved.get(name) != self._request.get(name))
            raise DataError(
                f"{self._file}: {self.path} belongs to a request with another {field} "
                f"({saved.get(field)!r}, now {self._request.get(field)!r}); remove it or write to another folder"
            )
        if not self.dry_run:
            for part in self._parts:
                _remove_leftovers(self.path / part)
        return result

    def _noted(self, name: str) -> Account | None:
        try:
            account = Account.from_json(json.loads((self.notes / f"{name}.json").read_bytes()))
        except FileNotFoundError:
            return None
        return account if _are_there(self.path, account.shards) else None

    def _write(self, content: dict[str, Any]) -> None:
        with atomic_file(self._file) as file:
            file.write(json.dumps(content, indent=1).encode())


def _do_and_note(function: Callable[[Job], Account], notes: Path, job: Job) -> Account:
    account = function(job)
    with atomic_file(notes / f"{job.name}.json") as file:
        file.write(json.dumps(account.to_json()).encode())
    return account


def _are_there(folder: Path, shards: dict[str, int]) -> bool:
    """Return whether all ``shards`` exist in ``folder`` with their sizes; a removed one is written again."""
    for name, size in shards.items():
        try:
            if (folder / name).stat().st_size != size:
                return False
        except FileNotFoundError:
            return False
    return True


def _remove_leftovers(folder: Path) -> None:
    """Remove unfinished files of dead processes: a kill leaves them behind, and they can be large."""
    for path in folder.glob(".*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdigit() and not Path("/proc", process).exists():
            path.unlink(missing_ok=True)
