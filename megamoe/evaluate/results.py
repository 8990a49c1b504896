"""Write the figures of an evaluation to RUN/eval.json and RUN/eval/<name>.jsonl.

The split called ``validation`` is the top level of eval.json; all others are under ``splits``. An evaluation replaces the
figures of its own split and keeps those of the others.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from megamoe.core.errors import UserError
from megamoe.core.files import atomic_file
from megamoe.core.run_folder import RunFolder

MAIN_SPLIT = "validation"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # becomes a file name


def results_folder(source: Path) -> Path:
    """Return the folder that takes the figures of ``source``, a run or a checkpoint.

    It is the run's folder, also for one of its checkpoints. For a checkpoint without a run it is the folder around the
    checkpoint, because a complete checkpoint does not change.
    """
    source = source.resolve()
    if RunFolder(source).checkpoints.is_dir():
        return source
    return source.parent.parent if source.parent.name == "checkpoints" else source.parent


def check_name(name: str) -> None:
    """Refuse a split name that cannot be a file name.

    Raises:
        UserError: it has characters other than letters, digits, ``.``, ``_`` and ``-``, or begins with a dot.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: names a file; use letters, digits, '.', '_' and '-', no dot in front")


def read_results(folder: Path) -> dict[str, Any]:
    """Read eval.json; without one, return an empty dictionary.

    Raises:
        UserError: the file is not a JSON object or cannot be read.
    """
    path = RunFolder(folder).results
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); remove it, eval writes it") from error
    if not isinstance(results, dict):
        raise UserError(f"{path}: holds no JSON object; remove it, eval writes it")
    return results


def write_results(folder: Path, result: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> Path:
    """Write the figures of ``result["name"]`` to eval.json and its examples to eval/<name>.jsonl.

    Returns:
        Path of eval.json. Both files are replaced atomically.

    Raises:
        UserError: the existing eval.json is damaged, or the folder cannot be written.
    """
    name = result["name"]
    results = read_results(folder)
    splits = results.pop("splits", {})
    if name == MAIN_SPLIT:
        results = dict(result)
    else:
        splits[name] = dict(result)
    if splits:
        results["splits"] = splits
    lines = "".join(json.dumps(example) + "\n" for example in examples)
    with atomic_file(RunFolder(folder).captions / f"{name}.jsonl") as file:
        file.write(lines.encode("utf-8"))
    path = RunFolder(folder).results
    with atomic_file(path) as file:
        file.write((json.dumps(results, indent=2, allow_nan=False) + "\n").encode("utf-8"))
    return path


def png_base64(image: npt.NDArray[np.uint8]) -> str:
    """Encode uint8 (H, W, 3) as a PNG in base64, for an HTML page."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
