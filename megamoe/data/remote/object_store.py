"""Read shards from object stores and any other source of fsspec: s3, gs, az, hf, sftp, ..."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec.core

from megamoe.core.errors import DataError
from megamoe.core.urls import masked, one_line
from megamoe.data.remote.stream import Interrupted, Patience, Refused, Stream

_BLOCK = 8 << 20  # bytes per request
_PATTERN = re.compile(r"[*?\[]")
_ETAGS = ("ETag", "etag", "generation", "blob_id", "md5Hash", "content_md5")
_DATES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")


def list_objects(name: str) -> list[str]:
    """List the tar files of a folder (``.../``, without subfolders) or the matches of a glob, sorted.

    Raises:
        DataError: nothing is found, or the store cannot be listed.
    """
    pattern = f"{name}*.tar" if name.endswith("/") else name
    # Matches come back without scheme and host; they are appended to what the user wrote before the pattern.
    first = _PATTERN.search(pattern)
    assert first is not None
    root = pattern[: pattern.rindex("/", 0, first.start()) + 1]
    try:
        files, path = _connect(pattern)
        files.invalidate_cache()  # an earlier listing of this process may be out of date
        found: dict[str, Mapping[str, Any]] = files.glob(path, detail=True)
        start = len(files._strip_protocol(root).rstrip("/")) + 1
    except Refused as refused:
        raise DataError(f"shards {masked(name)!r}: {refused.reason}; {refused.remedy}") from refused
    except Exception as error:  # every store has errors of its own
        failure = _failure(error)
        remedy = failure.remedy if isinstance(failure, Refused) else "check the network and the store's address"
        raise DataError(f"shards {masked(name)!r}: cannot be listed ({failure.reason}); {remedy}") from error
    names = [path for path, about in found.items() if about.get("type") == "file"]
    if name.endswith("/"):
        names = [path for path in names if not path.rpartition("/")[2].startswith(".")]
    # indexes lie beside their shards, and patterns such as train-* match them too
    names = sorted(f"{root}{path[start:]}" for path in names if not path.endswith(".idx"))
    if not names:
        what = "the folder holds no .tar file" if name.endswith("/") else "no object matches"
        raise DataError(f"shards {masked(name)!r}: {what}; check the bucket, the folder and the pattern")
    return names


@contextmanager
def open_object(url: str, offset: int, identity: str | None, patience: Patience) -> Iterator[Stream]:
    """Read an object from ``offset`` if it is still ``identity``, otherwise from its first byte.

    The identity is compared again after the last byte. Timeouts and retries of single requests belong to the file system
    (s3fs: 15 s per read, five retries); ``patience`` governs the retries on top.

    Raises:
        Refused, Interrupted: the stream cannot be opened.
    """
    try:
        files, path = _connect(url)
        before, length = _state(files, path)
        file = files.open(path, "rb", block_size=_BLOCK)
    except Refused:
        raise
    except Exception as error:
        raise _failure(error) from error
    start = offset if identity is not None and before == identity else 0

    def chunks() -> Iterator[bytes]:
        try:
            file.seek(start)
            while data := file.read(_BLOCK):
                yield data
            same = _state(files, path) == (before, length)
        except Exception as error:
            raise _failure(error) from error
        if not same:
            raise Interrupted("it was replaced while it was read", anew=True)

    with file:
        yield Stream(start, length, before, chunks())


def _connect(url: str) -> tuple[Any, str]:
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # its text names the package
        raise Refused(one_line(str(error)), "install that package with pip") from error
    except ValueError as error:
        raise Refused(
            one_line(str(error)), "name shards by path, http(s)://, s3://, gs://, az://, hf:// or pipe:"
        ) from error
    return files, path


def _state(files: Any, path: str) -> tuple[str | None, int | None]:
    """Return identity and size in bytes, from the store itself and not from a cached listing."""
    files.invalidate_cache(path)
    about = files.info(path)
    if about.get("type") == "directory":
        raise IsADirectoryError
    size = about.get("size")
    mark = next((str(about[key]) for key in (*_ETAGS, *_DATES) if about.get(key)), None)
    return (f"{mark};{size}" if mark else None), size


def _failure(error: Exception) -> Refused | Interrupted:
    if isinstance(error, IsADirectoryError):
        return Refused("it is a folder", "end its name in / to take the tar files in it")
    if isinstance(error, FileNotFoundError):
        return Refused("no such object", "check the name")
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return Refused(one_line(f"access denied: {error}"), "check the credentials")
    if isinstance(error, (ImportError, ValueError, TypeError, NotImplementedError)):
        return Refused(one_line(f"{type(error).__name__}: {error}"), "check the name and the store's settings")
    return Interrupted(one_line(f"{type(error).__name__}: {error}"))
