"""Detect what kind of source a path is, and open it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from data_tools.sources.columns import Columns, Names, choose_columns
from data_tools.sources.folder import open_folder
from data_tools.sources.item import FORMATS, Chunk, Source
from data_tools.sources.parquet import cut_parquet, parquet_header
from data_tools.sources.text_table import cut, read_header
from megamoe.core.errors import DataError
from megamoe.data.shards.index import IMAGE_EXTENSIONS

_SUFFIXES = {"csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "parquet": "parquet", "txt": "txt"}


def open_source(path: Path, shard_size: int, names: Names, input_format: str | None = None) -> Source:
    """Detect the format of ``path`` and cut it into shards of ``shard_size``; the last one of each file may be smaller.

    Args:
        path: a folder of pictures, a table, a list of URLs, or a folder of tables of one format, read in order of names.
        shard_size: samples per shard.
        names: names of a table's columns.
        input_format: one of ``FORMATS``; None: detected.

    Raises:
        DataError: it is no such source, consists of shards already, has no sample, or lacks a column.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; check the path")
    kind, tables = _detect(path, input_format)
    if kind == "folder":
        source = open_folder(path, shard_size, captions=names.captions)
    else:
        try:
            source = _open_tables(tables, kind, shard_size, names)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check its rights") from error
    if not source.chunks:
        raise DataError(f"{path}: holds no sample; check its format ({kind})")
    return source


def _detect(path: Path, input_format: str | None) -> tuple[str, list[Path]]:
    if path.is_dir():
        return _detect_folder(path, input_format)
    if input_format == "folder":
        raise DataError(f"{path}: --input-format folder, but it is a file; name the folder")
    kind = input_format or _kind(path)
    if path.suffix == ".tar":
        raise DataError(f"{path}: a shard already, so there is nothing to build; run `megamoe data validate {path}`")
    if kind is None:
        raise DataError(
            f"{path}: its format cannot be detected from its name; give --input-format {'|'.join(FORMATS[1:])}, "
            "and decompress it if it is compressed"
        )
    return kind, [path]


def _detect_folder(path: Path, input_format: str | None) -> tuple[str, list[Path]]:
    files = sorted(each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
    if input_format not in (None, "folder"):
        tables = [each for each in files if _kind(each) == input_format]
        if not tables:
            raise DataError(f"{path}: --input-format {input_format}, but it holds no .{input_format} file; check the path")
        return str(input_format), tables
    tars = [each for each in files if each.suffix == ".tar"]
    if input_format is None and tars:
        made = ", as img2dataset writes them" if any(each.name.endswith("_stats.json") for each in files) else ""
        raise DataError(
            f"{path}: shards already ({len(tars)} tars{made}), nothing to build; "
            f"run `megamoe data index {path}`, and `megamoe data validate {path}` to check it"
        )
    pictures = any(each.suffix[1:].lower() in IMAGE_EXTENSIONS for each in files)
    kinds = {kind for each in files if (kind := _kind(each)) not in (None, "txt")}
    if input_format == "folder" or pictures or not kinds or any(each.is_dir() for each in path.iterdir()):
        return "folder", []
    if len(kinds) > 1:
        raise DataError(f"{path}: holds tables of several kinds ({', '.join(sorted(kinds))}); choose with --input-format")
    kind = kinds.pop()
    return str(kind), [each for each in files if _kind(each) == kind]


def _kind(path: Path) -> str | None:
    return _SUFFIXES.get(path.suffix[1:].lower())


def _open_tables(tables: Sequence[Path], kind: str, shard_size: int, names: Names) -> Source:
    digest = hashlib.sha256()
    chunks: list[Chunk] = []
    chosen: list[Columns] = []
    for table in tables:
        state = table.stat()
        digest.update(f"{table.name!r} {state.st_size} {state.st_mtime_ns}\n".encode())
        header = parquet_header(table) if kind == "parquet" else read_header(table, kind)
        if kind == "txt" and names.captions:
            raise DataError(
                f"{table}: a list of URLs has no captions; give a table with a column of them, "
                "or --captions-optional for pictures without"
            )
        columns = choose_columns(header, table, names)
        if kind == "parquet":
            chunks += cut_parquet(table, columns, shard_size)
        else:
            chunks += cut(table, kind, header, columns, shard_size)
        chosen.append(columns)
    return Source(kind, chunks, digest.hexdigest(), any(each.online for each in chosen), str(chosen[0]))
