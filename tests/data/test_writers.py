"""Shards of widely used writers: the samples are those that webdataset reads in them."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from megamoe.data import ShardDataset
from tests.data.shard_factory import caption, jpeg, sample, write_tar


def keys(shards: Path | str) -> list[str]:
    return [each["__key__"] for each in ShardDataset(shards, epochs=1, global_batch=12, seed=5)]


def read_alike(shard: Path) -> dict[str, dict[str, Any]]:
    theirs = {each["__key__"]: each for each in wds.WebDataset(str(shard), shardshuffle=False)}
    ours = {each["__key__"]: each for each in ShardDataset(shard, epochs=1, global_batch=1, seed=5)}
    for each in theirs.values():
        each.pop("__local_path__", None)
    assert ours == theirs and ours
    return ours


def test_tars_of_webdatasets_shard_writer(tmp_path: Path) -> None:
    with wds.ShardWriter(str(tmp_path / "w-%06d.tar"), maxcount=7, verbose=0) as writer:
        for n in range(20):
            writer.write({"__key__": f"a/b{n:04d}", "jpg": jpeg(n), "txt": caption(n), "json": {"n": n}, "cls": n})
    found = [key for shard in sorted(tmp_path.glob("*.tar")) for key in read_alike(shard)]
    assert sorted(found) == [f"a/b{n:04d}" for n in range(20)]
    assert sorted(keys(f"{tmp_path}/w-{{000000..000002}}.tar")) == sorted(found)


def test_tars_in_img2datasets_layout(tmp_path: Path) -> None:
    members = []
    for n in range(12):
        about = {"caption": caption(n), "url": f"http://a/{n}", "key": f"00003{n:04d}", "status": "success"}
        members += [(f"00003{n:04d}.jpg", jpeg(n)), (f"00003{n:04d}.json", json.dumps(about).encode())]
        members += [(f"00003{n:04d}.txt", caption(n).encode())]
    write_tar(tmp_path / "00003.tar", members)
    pq.write_table(pa.table({"key": ["000030000"], "status": ["success"]}), tmp_path / "00003.parquet")
    (tmp_path / "00003_stats.json").write_text("{}")
    read_alike(tmp_path / "00003.tar")
    assert len(keys(tmp_path)) == 12, "what lies beside the tars is no shard"


@pytest.mark.parametrize("kind", ["ustar", "pax", "gnu", "oldgnu"])
def test_tars_of_gnu_tar(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "files"
    stems = [f"{n:05d}" for n in range(5)]
    if kind != "ustar":
        stems += ["n" * 120, "d" * 90 + "/" + "m" * 100, "k" * 200, "é" * 90]
    else:
        stems += ["d" * 90 + "/" + "m" * 80]  # ustar has 155 + 100 characters, split at a slash
    for n, stem in enumerate(stems):
        (folder / stem).parent.mkdir(parents=True, exist_ok=True)
        for ext, content in [("jpg", jpeg(n)), ("txt", caption(n).encode()), ("JSON", b'{"a": 1}')]:
            (folder / f"{stem}.{ext}").write_bytes(content)
    names = [f"{stem}.{ext}" for stem in stems for ext in ("jpg", "txt", "JSON")]
    subprocess.run(["tar", f"--format={kind}", "-cf", tmp_path / "a.tar", "-C", folder, *names], check=True)
    found = read_alike(tmp_path / "a.tar")
    assert sorted(found) == sorted(stems)
    assert found["00000"]["json"] == b'{"a": 1}'


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_python(tmp_path: Path, format: int) -> None:
    read_alike(write_tar(tmp_path / "a.tar", [m for n in range(5) for m in sample(n)], format))
