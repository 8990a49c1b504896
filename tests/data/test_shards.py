"""Names of shards, as users of WebDataset write them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from megamoe.core.errors import DataError
from megamoe.data.shards.expand import expand_shards, is_remote
from megamoe.data.shards.labels import shard_labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("00000.tar", "00001.tar", "00002.tar", "00001.tar.idx", ".hidden.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture
def bucket() -> Iterator[str]:
    """Put objects into fsspec's store in memory; test_s3.py uses a real S3 server."""
    store = fsspec.filesystem("memory")
    for name in ("00001.tar", "00000.tar", "00001.tar.idx", ".hidden.tar", "notes.txt", "below/00009.tar"):
        store.pipe(f"/shards/train/{name}", b"x")
    yield "memory://shards/train"
    store.rm("/shards", recursive=True)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{}/{00000..00002}.tar", ["00000.tar", "00001.tar", "00002.tar"]),
        ("{}/{00002,00000}.tar", ["00002.tar", "00000.tar"]),
        ("{}", ["00000.tar", "00001.tar", "00002.tar"]),
        ("{}/", ["00000.tar", "00001.tar", "00002.tar"]),
        ("{}/0*", ["00000.tar", "00001.tar", "00002.tar"]),
        ("{}/0000[12].tar", ["00001.tar", "00002.tar"]),
        ("{}/00002.tar::{}/00001.tar", ["00002.tar", "00001.tar"]),
        ("{}/{00002..00002}.tar::{}/*0.tar", ["00002.tar", "00000.tar"]),
        ("file://{}/0000{1..2}.tar", ["00001.tar", "00002.tar"]),
    ],
)
def test_each_form_names_the_shards_in_its_order(folder: Path, spec: str, expected: list[str]) -> None:
    assert expand_shards([spec.replace("{}", str(folder))]) == [str(folder / name) for name in expected]


def test_specs_follow_one_another(folder: Path) -> None:
    names = [f"{folder}/00002.tar", f"{folder}/00000.tar"]
    assert expand_shards(names) == names


def test_a_real_name_wins_over_a_pattern(tmp_path: Path) -> None:
    odd = tmp_path / "a[1]{b}.tar"
    odd.write_bytes(b"x")
    assert expand_shards([str(odd)]) == [str(odd)]


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert len(expand_shards(["~"])) == 3
    assert len(expand_shards(["~/{00000..00001}.tar"])) == 2


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("http://host/{0..1}.tar", ["http://host/0.tar", "http://host/1.tar"]),
        ("https://host/{a,b}.tar?sig=x", ["https://host/a.tar?sig=x", "https://host/b.tar?sig=x"]),
        ("https://a/0.tar::s3://b/0.tar", ["https://a/0.tar", "s3://b/0.tar"]),
        ("http://[::1]:80/{0..1}.tar::b/c.tar::gs://x/y.tar", ["http://[::1]:80/0.tar", "http://[::1]:80/1.tar"]),
        ("pipe:aws s3 cp s3://b/{0..1}.tar -", ["pipe:aws s3 cp s3://b/0.tar -", "pipe:aws s3 cp s3://b/1.tar -"]),
        (r"pipe:cat a\ b.tar", [r"pipe:cat a\ b.tar"]),
        ("s3://bucket/{00000..00001}.tar", ["s3://bucket/00000.tar", "s3://bucket/00001.tar"]),
        ("hf://datasets/o/r@main/{0,1}.tar", ["hf://datasets/o/r@main/0.tar", "hf://datasets/o/r@main/1.tar"]),
    ],
)
def test_remote_names_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, expected: list[str]
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c.tar").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    names = expand_shards([spec])
    assert names[: len(expected)] == expected
    assert names[len(expected) :] in ([], ["b/c.tar", "gs://x/y.tar"])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{}/", ["00000.tar", "00001.tar"]),
        ("{}/0*", ["00000.tar", "00001.tar"]),
        ("{}/**/*.tar", [".hidden.tar", "00000.tar", "00001.tar", "below/00009.tar"]),
        ("{}/{0000[1],below/0*}.tar", ["00001.tar", "below/00009.tar"]),
    ],
)
def test_folders_and_globs_of_a_store_are_listed_in_order(bucket: str, spec: str, expected: list[str]) -> None:
    assert expand_shards([spec.replace("{}", bucket)]) == [f"{bucket}/{name}" for name in expected]


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("{}/{00000..00003}.tar", "00003.tar: no such file"),
        ("{}/{00000..01999}.tar", "00003.tar: no such file"),
        ("{}/*.gz", "no file matches"),
        ("{}/empty", "the folder holds no .tar file"),
        ("{}/{00000..00003.tar", "unbalanced braces"),
        ("{}/00000.tar::", "a name in it is empty"),
        ("{}/00000.tar::{}", "named twice"),
        ("s3://b/a.tar::s3://b/{a,c}.tar", "s3://b/a.tar: named twice"),
        ("https://u:hidden@h/a.tar?hidden::https://u:hidden@h/a.tar?hidden", "named twice"),
        ("http://host/folder/", "a web server cannot list its files; write http://host/path/"),
        ("https://host/*.tar", "a web server cannot list its files"),
        ("pipe:", "the command is missing"),
        ("memory://nowhere/", "the folder holds no .tar file"),
        ("memory://nowhere/*.tar", "no object matches"),
        ("nonsense://host/*.tar", "Protocol not known: nonsense; name shards by path"),
        ("gs://bucket/", "install gcsfs"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(folder: Path, spec: str, line: str) -> None:
    if spec.startswith("gs:"):
        try:
            import gcsfs  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("gcsfs is installed")
    with pytest.raises(DataError, match=line) as raised:
        expand_shards([spec.replace("{}", str(folder))])
    assert "\n" not in str(raised.value) and "hidden" not in str(raised.value)


def test_no_shards_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="no shards are named"):
        expand_shards([])


@pytest.mark.parametrize("spec", ["{}", "{}/*.tar", "{}/{0000{0..2},z}.tar"])
def test_one_file_under_two_names_is_refused(folder: Path, spec: str) -> None:
    os.symlink(folder / "00000.tar", folder / "z.tar")
    with pytest.raises(DataError, match="named twice"):
        expand_shards([spec.replace("{}", str(folder))])


def test_217000_remote_names_are_cheap() -> None:
    started = time.process_time()
    names = expand_shards(["s3://laion/{000000..216999}.tar"])
    labels = shard_labels(names)
    assert time.process_time() - started < 4  # about 1 s
    assert (len(names), labels[-1]) == (217_000, "216999.tar")


def test_many_local_names_cost_a_listing_not_a_look_at_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1500):
        (tmp_path / f"{number:05d}.tar").touch()
    os.symlink(tmp_path / "00000.tar", tmp_path / "again.tar")
    looks = 0
    stat, lstat = os.stat, os.lstat

    def counted(real):  # type: ignore[no-untyped-def]
        def count(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal looks
            looks += 1
            return real(*arguments, **options)

        return count

    monkeypatch.setattr(os, "stat", counted(stat))
    monkeypatch.setattr(os, "lstat", counted(lstat))
    assert len(expand_shards([f"{tmp_path}/{{00000..01499}}.tar"])) == 1500
    assert looks < 100
    with pytest.raises(DataError, match="named twice"):
        expand_shards([f"{tmp_path}/{{00000..01499}}.tar::{tmp_path}/again.tar"])


def test_labels_are_short_where_they_can_be() -> None:
    shards = ["a/0.tar", "b/0.tar", "b/1.tar", "s3://c/2.tar", "https://u:pw@h/3.tar?sig=x", "pipe:cat d/4.tar | cat"]
    assert shard_labels(shards) == ["a/0.tar", "b/0.tar", "1.tar", "2.tar", "3.tar", "4.tar"]


def test_labels_are_unique_and_tell_no_secret() -> None:
    shards = [
        "https://h/a/0.tar?sig=hidden",
        "https://h/b/0.tar?sig=hidden",
        "https://h/1.tar?key=hidden1",
        "https://h/1.tar?key=hidden2",
        "pipe:make shard 7",
    ]
    labels = shard_labels(shards)
    assert labels[:2] == ["https://h/a/0.tar", "https://h/b/0.tar"]
    assert labels[4] == "pipe:make shard 7"
    assert len(set(labels)) == 5 and not any("hidden" in label for label in labels)


def test_remote_is_what_is_no_file() -> None:
    assert [is_remote(name) for name in ("a/0.tar", "/a:b.tar", "http://h/a", "s3://b/a", "pipe:cat a")] == [
        *(False, False, True, True, True)
    ]
