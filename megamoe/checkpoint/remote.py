"""Checkpoints in an object store, or any other place fsspec writes to: ``URL/step-00000100/`` with the local files.

A store has no rename. A checkpoint there is complete when its manifest exists, so the manifest is written last and deleted
first. It names every other file with its size and checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec.core

from megamoe.checkpoint.folders import checkpoint_name, incomplete_path, publish
from megamoe.checkpoint.manifest import MANIFEST, read_manifest
from megamoe.checkpoint.tensorfile import TensorFile
from megamoe.core.errors import CheckpointError, DamagedCheckpoint
from megamoe.core.run_folder import RunFolder
from megamoe.core.urls import masked, one_line

_ABANDONED = "abandoned-manifest.json"  # of an abandoned history
_FILES_AT_A_TIME = 8
Result = TypeVar("Result")


class RemoteCheckpoints:
    """The checkpoints under a URL.

    Args:
        url: A folder that fsspec writes, such as ``s3://bucket/runs/one``.

    Raises:
        CheckpointError: also from every method: the store cannot be reached or refuses, after its own retries.
    """

    def __init__(self, url: str):
        self.url = masked(url)
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:  # an ImportError names the missing package
            raise CheckpointError(
                f"checkpoint.mirror {self.url}: {one_line(str(error))}; give a folder as s3://, gs://, az:// or a path"
            ) from None
        self._root: str = root.rstrip("/")

    def steps(self) -> list[int]:
        """List the steps of the complete checkpoints, in order."""
        found = self._ask("listed", lambda: self._files.glob(f"{self._root}/step-*/{MANIFEST}"))
        names = [path.rsplit("/", 2)[-2] for path in found]
        return sorted(int(name[5:]) for name in names if name[5:].isdigit() and checkpoint_name(int(name[5:])) == name)

    def put(self, folder: Path) -> None:
        """Copy a complete local checkpoint, replacing a different one of the same step.

        Raises:
            FileNotFoundError: the local checkpoint was deleted meanwhile.
        """
        manifest = (folder / MANIFEST).read_bytes()
        there = f"{self._root}/{folder.name}"
        if self._read(f"{there}/{MANIFEST}") == manifest:
            return
        self._remove(f"{there}/{MANIFEST}")
        for path in (self._root, there):
            self._ask("written", lambda path=path: self._make_folder(path))  # type: ignore[misc]
        paths = [folder / name for name in read_manifest(folder).files]
        try:
            self._each("written", lambda path: self._files.put_file(str(path), f"{there}/{path.name}"), paths)
        except CheckpointError:
            if not folder.exists():
                raise FileNotFoundError(folder) from None
            raise
        self._ask("written", lambda: self._files.pipe_file(f"{there}/{MANIFEST}", manifest))

    def fetch(self, step: int, run: Path) -> Path:
        """Download a checkpoint to its place in the folder of a run.

        Returns:
            The local checkpoint, every byte of which matches its checksum.

        Raises:
            DamagedCheckpoint: it is not what was written.
        """
        folder = RunFolder(run).checkpoint(step)
        into, there = incomplete_path(folder), f"{self._root}/{folder.name}"
        into.mkdir(parents=True, exist_ok=True)
        manifest = self._read(f"{there}/{MANIFEST}")
        if manifest is None:
            raise DamagedCheckpoint(f"checkpoint {self.url}/{folder.name}: has no {MANIFEST}")
        try:
            (into / MANIFEST).write_bytes(manifest)
            named = read_manifest(into).files  # file names only: none leads out of the folder
            self._each("read", lambda name: self._files.get_file(f"{there}/{name}", str(into / name)), named)
            for name, expected in named.items():
                with TensorFile(into / name, expected) as file:
                    for _ in file.check_blocks():
                        pass
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"{error} (fetched from {self.url})") from None
        publish(folder)
        return folder

    def abandon(self, step: int) -> None:
        """Hide a checkpoint, so that no run resumes from it: the run continued from an earlier one. Its files stay."""
        there = f"{self._root}/{checkpoint_name(step)}"
        manifest = self._read(f"{there}/{MANIFEST}")
        if manifest is not None:
            self._ask("written", lambda: self._files.pipe_file(f"{there}/{_ABANDONED}", manifest))
            self._remove(f"{there}/{MANIFEST}")

    def delete(self, step: int) -> None:
        """Delete a checkpoint. It is absent at once."""
        there = f"{self._root}/{checkpoint_name(step)}"
        self._remove(f"{there}/{MANIFEST}")
        self._ask("deleted", lambda: self._files.rm(there, recursive=True))

    def _make_folder(self, path: str) -> None:
        with suppress(FileExistsError):
            self._files.mkdir(path, create_parents=False)  # never create the bucket: if it is missing, its name is misspelt

    def _read(self, path: str) -> bytes | None:
        def read() -> bytes | None:
            self._files.invalidate_cache()
            try:
                data: bytes = self._files.cat_file(path)
            except FileNotFoundError:
                return None
            return data

        return self._ask("read", read)

    def _remove(self, path: str) -> None:
        if self._read(path) is not None:
            self._ask("deleted", lambda: self._files.rm_file(path))

    def _each(self, verb: str, act: Callable[[Any], None], items: Iterable[Any]) -> None:
        with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
            for done in [pool.submit(self._ask, verb, lambda item=item: act(item)) for item in items]:
                done.result()

    def _ask(self, verb: str, question: Callable[[], Result]) -> Result:
        try:
            self._files.invalidate_cache()  # other processes write there too
            return question()
        except Exception as error:  # every store raises its own error types
            reason = one_line(f"{type(error).__name__}: {error}")
            raise CheckpointError(
                f"checkpoint.mirror {self.url}: cannot be {verb} ({reason}); check address, credentials and network"
            ) from None
