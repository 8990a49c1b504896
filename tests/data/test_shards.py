"""Names of shards, as users of WebDataset write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megamoe.data.shards import expand_shards, shard_labels
from megamoe.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("00000.tar", "00001.tar", "00002.tar", "00001.tar.idx", ".hidden.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{}/{00000..00002}.tar", ["00000.tar", "00001.tar", "00002.tar"]),
        ("{}/{00002,00000}.tar", ["00002.tar", "00000.tar"]),
        ("{}", ["00000.tar", "00001.tar", "00002.tar"]),
        ("{}/0*", ["00000.tar", "00001.tar", "00002.tar"]),
        ("{}/0000[12].tar", ["00001.tar", "00002.tar"]),
        ("{}/00002.tar::{}/00001.tar", ["00002.tar", "00001.tar"]),
        ("{}/{00002..00002}.tar::{}/*0.tar", ["00002.tar", "00000.tar"]),
    ],
)
def test_each_form_names_the_shards_in_its_order(folder: Path, spec: str, expected: list[str]) -> None:
    assert [path.name for path in expand_shards([spec.replace("{}", str(folder))])] == expected


def test_specs_follow_one_another(folder: Path) -> None:
    names = expand_shards([f"{folder}/00002.tar", f"{folder}/00000.tar"])
    assert [path.name for path in names] == ["00002.tar", "00000.tar"]


def test_a_real_name_wins_over_a_pattern(tmp_path: Path) -> None:
    odd = tmp_path / "a[1]{b}.tar"
    odd.write_bytes(b"x")
    assert expand_shards([str(odd)]) == [odd]


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert len(expand_shards(["~"])) == 3
    assert len(expand_shards(["~/{00000..00001}.tar"])) == 2


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("{}/{00000..00003}.tar", "00003.tar: no such file"),
        ("{}/*.gz", "no file matches"),
        ("{}/empty", "the folder holds no .tar file"),
        ("{}/{00000..00003.tar", "unbalanced braces"),
        ("http://host/a.tar", "http:// cannot be read in this version"),
        ("https://host/{0..3}.tar", "https:// cannot be read in this version"),
        ("s3://bucket/a.tar", "s3:// cannot be read in this version"),
        ("pipe:cat a.tar", "pipe: cannot be read in this version"),
        ("{}/00000.tar::", "there is an empty name in it"),
        ("{}/00000.tar::{}", "named twice"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(folder: Path, spec: str, line: str) -> None:
    with pytest.raises(DataError, match=line) as raised:
        expand_shards([spec.replace("{}", str(folder))])
    assert "\n" not in str(raised.value)


def test_no_shards_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="no shards are named"):
        expand_shards([])


def test_one_file_under_two_names_is_refused(folder: Path) -> None:
    os.symlink(folder / "00000.tar", folder / "z.tar")
    with pytest.raises(DataError, match="named twice"):
        expand_shards([str(folder)])


def test_labels_are_short_where_they_can_be() -> None:
    shards = [Path("a/0.tar"), Path("b/0.tar"), Path("b/1.tar")]
    assert shard_labels(shards) == ["a/0.tar", "b/0.tar", "1.tar"]
