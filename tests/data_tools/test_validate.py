"""`megamoe data validate`: each kind of fault is found, named, and does not hide the others."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from megamoe.commands.data.group import data
from megamoe.core.errors import DataError
from megamoe.data.shards.index import build_index, index_path, write_index
from tests.data.shard_factory import jpeg, sample, write_tar

PICTURE, TEXT = sample(1)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(data, ["validate", *(str(each) for each in arguments), "--processes", "1"])


def check(tmp_path: Path, *options: object) -> tuple[Result, list[dict[str, Any]]]:
    """Return the result, and the problems of all lines of the report file."""
    report = tmp_path / "report.jsonl"
    result = run(tmp_path / "in", "--report", report, *options)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    return result, [problem for line in lines for problem in line["problems"]]


def shard(tmp_path: Path, members: list[tuple[str, bytes]], name: str = "00000.tar") -> Path:
    return write_tar(tmp_path / "in" / name, members)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def test_good_shards_give_zero(tmp_path: Path) -> None:
    for number in range(3):
        path = shard(tmp_path, [m for n in range(4 * number, 4 * number + 4) for m in sample(n)], f"{number:05d}.tar")
        write_index(build_index(path), index_path(path, None))
    result, problems = check(tmp_path)
    assert result.exit_code == 0 and not problems
    assert result.stdout.splitlines()[-1] == "3 shards, 0 with problems; 12 samples, 12 good"


@pytest.mark.parametrize(
    ("members", "cause", "key"),
    [
        ([PICTURE], "no caption", "00001"),
        ([TEXT], "no picture", "00001"),
        ([PICTURE, ("00001.json", b'{"caption": null}')], "no caption", "00001"),
        ([(PICTURE[0], PICTURE[1][:-9]), TEXT], "damaged picture", "00001"),
        ([(PICTURE[0], b""), TEXT], "damaged picture", "00001"),
        ([(PICTURE[0], b"<html>"), TEXT], "damaged picture", "00001"),
        ([PICTURE, (TEXT[0], b"\xff")], "damaged caption", "00001"),
        ([PICTURE, (TEXT[0], b" \n")], "damaged caption", "00001"),
        ([PICTURE, ("00001.json", b'{"caption": " "}')], "damaged caption", "00001"),
        ([PICTURE, TEXT, ("00001.json", b'{"a": ')], "damaged json", "00001"),
        ([PICTURE, TEXT, ("00001.json", b"[" * 100_000)], "damaged json", "00001"),
        ([(PICTURE[0], png()), TEXT], "wrong extension", "00001"),
        ([PICTURE, TEXT, *sample(2), PICTURE, TEXT], "duplicate key", "00001"),
        ([PICTURE, *sample(2), TEXT], "members not next to each other", "00001"),
    ],
)
def test_each_fault_is_named_once_with_its_key(
    tmp_path: Path, members: list[tuple[str, bytes]], cause: str, key: str
) -> None:
    shard(tmp_path, [*members, *sample(7)])
    result, problems = check(tmp_path)
    assert result.exit_code == 1 and [(each["cause"], each["key"]) for each in problems] == [(cause, key)]
    assert cause in result.stdout and key in result.stdout


def test_without_decoding_a_picture_that_only_begins_well_passes(tmp_path: Path) -> None:
    shard(tmp_path, [(PICTURE[0], PICTURE[1][:-9]), TEXT, ("00002.jpg", b"<html>"), ("00002.txt", b"a")])
    result, problems = check(tmp_path, "--no-decode")
    assert result.exit_code == 1 and [each["key"] for each in problems] == ["00002"]


def test_damaged_shards_are_reported_with_what_could_be_read_and_the_others_are_checked(tmp_path: Path) -> None:
    for number in range(4):
        members = [m for n in range(4 * number, 4 * number + 4) for m in sample(n)]
        path = shard(tmp_path, members, f"{number:05d}.tar")
        with tarfile.open(path) as tar:
            at = {info.name: info.offset_data - 512 for info in tar}
        if number == 1:
            os.truncate(path, at["00007.jpg"])
        if number == 2:
            path.write_bytes(path.read_bytes() * 2)
    (tmp_path / "in/00004.tar").write_bytes(b"no tar at all" * 100)
    result, problems = check(tmp_path, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["shards"] == 5
    assert [Path(name).name for name in report["bad_shards"]] == ["00001.tar", "00002.tar", "00004.tar"]
    assert {each["cause"] for each in problems} == {"damaged shard"}
    for problem, text in zip(problems, ("truncated at byte", "two tars joined", "not a tar file"), strict=True):
        assert text in problem["detail"]
    assert report["samples"] >= 4 + 2 + 3 + 4 and report["good"] == report["samples"]


def test_keys_that_several_shards_share_are_named_with_the_first_of_them(tmp_path: Path) -> None:
    shard(tmp_path, [*sample(0), *sample(1), *sample(2)], "a.tar")
    shard(tmp_path, [*sample(3), *sample(1)], "b.tar")
    shard(tmp_path, [*sample(2), *sample(1), *sample(4)], "c.tar")
    result, problems = check(tmp_path)
    assert result.exit_code == 1
    assert [(each["key"], Path(each["detail"]).name) for each in problems] == [
        ("00001", "a.tar"),
        ("00002", "a.tar"),
        ("00001", "a.tar"),
    ]
    assert "5 samples" not in result.stdout and "8 samples, 8 good" in result.stdout


def test_an_index_that_is_not_of_the_shard_is_found(tmp_path: Path) -> None:
    path = shard(tmp_path, [*sample(0), *sample(1)])
    write_index(build_index(path), index_path(path, None))
    before = path.stat()
    data = bytearray(path.read_bytes())
    assert run(tmp_path / "in").exit_code == 0
    # the two samples change places: as many bytes, the same time, other offsets
    write_tar(path, [*sample(1), *sample(0)])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == len(data)
    result, problems = check(tmp_path)
    assert result.exit_code == 1 and [each["cause"] for each in problems] == ["index not current"]
    os.utime(path)
    result, problems = check(tmp_path)
    assert [each["cause"] for each in problems] == ["index not current"] and "older than its shard" in problems[0]["detail"]


def test_all_faults_of_a_sample_are_reported_and_it_counts_as_one(tmp_path: Path) -> None:
    shard(tmp_path, [("00001.jpg", b"?"), ("00001.txt", b""), ("00001.json", b"{"), *sample(2), ("README", b"")])
    result, problems = check(tmp_path)
    assert len(problems) == 3 and "2 samples, 1 good" in result.stdout


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    for number in range(5):
        shard(tmp_path, [*sample(number), (f"{number}x.jpg", jpeg(1)[:-5]), (f"{number}x.txt", b"a")], f"{number}.tar")
    one = run(tmp_path / "in", "--json")
    two = CliRunner().invoke(data, ["validate", str(tmp_path / "in"), "--json", "--processes", "2"])
    assert one.stdout == two.stdout and one.exit_code == two.exit_code == 1


def test_a_wrong_request_is_refused(tmp_path: Path) -> None:
    assert isinstance(run(tmp_path / "nowhere").exception, DataError)
    shard(tmp_path, sample(0))
    (tmp_path / "file").write_text("")
    result = run(tmp_path / "in", "--report", tmp_path / "file/report")
    assert isinstance(result.exception, DataError) and "cannot be written" in str(result.exception)
