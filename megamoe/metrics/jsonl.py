"""Write files of one JSON object per line that survive kill -9 and can be cut back to a step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megamoe.core.errors import UserError


def to_line(record: Mapping[str, object]) -> bytes:
    """Encode ``record`` as one line of strict JSON.

    Tensors and arrays become numbers and lists. NaN and infinities become ``null``: JSON has no word for them, and a
    column of numbers and nulls stays a column of numbers in every reader. A file name that is not UTF-8 is written with
    JSON's own escapes, so that Python reads the same name back.
    """
    text = json.dumps(_plain(record), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace") + b"\n"


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the complete lines of ``path`` and the objects in them. Ignore an unfinished last line: its writer was killed.

    Raises:
        UserError: a complete line is no JSON object with an integer ``step``.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                int(record["step"])
            except (ValueError, TypeError, KeyError, RecursionError):
                raise UserError(
                    f"{path}: line {number} is no JSON object with a step ({line[:40]!r}); remove that line"
                ) from None
            yield line, record


def truncate(path: Path, step: int) -> int | None:
    """Keep the complete lines up to ``step`` and return the last step kept.

    The file is replaced atomically: a crash leaves either the old or the new one. A missing file stays missing.
    """
    if not path.exists():
        return None
    last = None
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for line, record in read_lines(path):
            if record["step"] <= step:
                file.write(line)
                last = int(record["step"])
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return last


def append(file: BinaryIO, lines: bytes) -> None:
    """Write whole lines and flush them to the operating system, so that they outlive this process."""
    file.write(lines)
    file.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # torch.Tensor, numpy.ndarray, numpy scalars
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
