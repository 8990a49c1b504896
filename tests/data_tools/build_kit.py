"""Share pictures, calls and readers of the output among the tests of `megamoe data build`."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
from click.testing import CliRunner, Result
from PIL import Image

from megamoe.commands.data.group import data


def build(source: object, out: object, *options: object) -> Result:
    """Call the verb, in this process unless the arguments say otherwise."""
    where = () if "--processes" in options else ("--processes", 1)
    return CliRunner().invoke(data, ["build", *map(str, (source, out, *where, *options))])


def picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 20), **options: Any) -> bytes:
    """Make a picture as Pillow writes it."""
    file = io.BytesIO()
    image = Image.linear_gradient("L").resize(size).convert("RGBA" if mode == "RGBA" else "RGB").convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.new("L", size, 0))
    image.save(file, kind, **options)
    return file.getvalue()


def members(out: Path) -> dict[str, bytes]:
    """Read all members of all shards, by name."""
    found: dict[str, bytes] = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for info in tar:
                assert info.name not in found
                found[info.name] = tar.extractfile(info).read()  # type: ignore[union-attr]
    return found


def metadata(out: Path) -> list[dict[str, Any]]:
    """Read the JSON of all samples, in order."""
    return [json.loads(content) for name, content in members(out).items() if name.endswith(".json")]


def rows(out: Path) -> list[dict[str, Any]]:
    """Read the rows of all parquets, in order: one per item of the source."""
    found: list[dict[str, Any]] = []
    for path in sorted(out.glob("*.parquet")):
        found += pq.read_table(path).to_pylist()
    return found


def stats(out: Path) -> list[dict[str, Any]]:
    """Read the totals of all shards."""
    return [json.loads(path.read_bytes()) for path in sorted(out.glob("*_stats.json"))]


def shard_bytes(out: Path) -> dict[str, bytes]:
    """Read tars and parquets, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix in (".tar", ".parquet")}
