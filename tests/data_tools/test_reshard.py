"""`megamoe data reshard`: the same samples in other shards."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.verbs.reshard import reshard_shards
from data_tools.writing.shuffle import shuffled
from data_tools.writing.spans import SPAN, ShardToScan, read_span, scan_shard
from megamoe.core.errors import DataError, UserError
from megamoe.data.shards.index import build_index
from tests.data.shard_factory import write_tar
from tests.data_tools.shaping import (
    Members,
    digests,
    full_sample,
    make_shards,
    numbered,
    outcome,
    read_folder,
    read_tar,
    run,
)


def frozen(samples: list[tuple[str, Members]]) -> Counter[tuple[str, tuple[tuple[str, bytes], ...]]]:
    return Counter((key, tuple(members.items())) for key, members in samples)


def small_shards(folder: Path, counts: list[int]) -> list[tuple[str, Members]]:
    """Write shards of small samples with members of many sizes, and return the samples in order. Shards may be empty."""
    starts = [0, *accumulate(counts)]
    shards = [
        [
            (f"k{n}", {"jpg": bytes([n % 256]) * (n * 37 % 1500), "txt": f"{n}".encode()})
            for n in range(start, start + count)
        ]
        for start, count in zip(starts, counts, strict=False)
    ]
    make_shards(folder, shards)
    return [sample for shard in shards for sample in shard]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any),
    size=st.integers(1, 20),
    seed=st.none() | st.integers(0, 2**70),
    memory=st.sampled_from([1, 5000, 1 << 30]),
)
def test_the_samples_are_the_same_and_shards_are_equal(counts: list[int], size: int, seed: int | None, memory: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = small_shards(folder / "s", counts)
        account = reshard_shards(str(folder / "s"), folder / "o", shard_size=size, seed=seed, memory=memory, processes=1)
        shards = [read_tar(path) for path in sorted((folder / "o").glob("*.tar"))]
        got = [sample for shard in shards for sample in shard]
        assert frozen(got) == frozen(samples) and account.kept == len(samples)
        assert [len(shard) for shard in shards[:-1]] == [size] * (len(shards) - 1) and 1 <= len(shards[-1]) <= size
        if seed is None:
            assert got == samples
        else:
            order = np.concatenate(list(shuffled(len(samples), seed, len(samples))))
            assert got == [samples[i] for i in order]


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 3000), seed=st.integers(0, 2**128 - 1), piece=st.integers(1, 4000))
def test_the_permutation_does_not_depend_on_the_memory_there_is(samples: int, seed: int, piece: int) -> None:
    whole = np.random.Philox(
        key=np.array([seed % 2**64, seed >> 64], dtype=np.uint64), counter=np.array([0, 0, 0, 2], dtype=np.uint64)
    ).random_raw(samples)
    piece = max(piece, samples // 20)
    assert np.concatenate(list(shuffled(samples, seed, piece))).tolist() == np.argsort(whole, kind="stable").tolist()


def test_pieces_of_the_permutation_are_as_large_as_asked() -> None:
    sizes = [len(piece) for piece in shuffled(3 << 20, 5, 1 << 19)]
    assert len(sizes) == 6 and max(sizes) < 1.02 * (1 << 19)


def test_every_place_is_equally_likely_for_every_sample() -> None:
    counts = np.zeros((5, 5), dtype=np.int64)
    for seed in range(4000):
        counts[np.arange(5), np.concatenate(list(shuffled(5, seed, 5)))] += 1
    assert ((counts - 800) ** 2 / 800).sum() < 39.3  # chi-squared with 16 degrees of freedom: one in a thousand


@pytest.mark.parametrize("shuffle", [(), ("--shuffle", "--seed", 3)])
def test_neither_processes_nor_memory_change_a_byte(tmp_path: Path, shuffle: tuple[object, ...]) -> None:
    source = numbered(tmp_path / "s", [13, 1, 30, 6])
    for name, options in (("a", ("--processes", 1)), ("b", ("--processes", 2, "--memory", 1e-5))):
        outcome("reshard", source, tmp_path / name, "--shard-size", 12, *shuffle, *options)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_all_members_come_along_and_the_source_is_not_touched(tmp_path: Path) -> None:
    source = numbered(tmp_path / "s", [20, 20])
    before = digests(source)
    found = outcome("reshard", source, tmp_path / "o", "--shard-size", 15, "--shuffle")
    assert dict(read_folder(tmp_path / "o")) == {f"{n:05d}": full_sample(n) for n in range(40)}
    assert digests(source) == before and found["kept"] == 40 and set(found["shards"]) == {f"0000{n}.tar" for n in range(3)}
    assert {int(key) < 20 for key, _ in read_tar(tmp_path / "o/00000.tar")} == {True, False}
    assert sum(build_index(path).samples for path in (tmp_path / "o").glob("*.tar")) == 40


@pytest.mark.parametrize("limit", [20480, 40960, 100_000])
def test_no_shard_is_larger_than_asked_but_for_a_sample_that_is(tmp_path: Path, limit: int) -> None:
    names = ["a" * 80, "b" * 89, "c" * 150, "d" * 300, "ü" * 60, "é", *(f"k{n}" for n in range(60))]
    sizes = [(n * 977) % 9000 for n in range(len(names))]
    sizes[30] = 150_000
    shards = [[(key, {"jpg": bytes(size), "txt": b"t"}) for key, size in zip(names, sizes, strict=True)]]
    outcome("reshard", make_shards(tmp_path / "s", shards), tmp_path / "o", "--shard-bytes", limit)
    assert read_folder(tmp_path / "o") == shards[0]
    made = sorted((tmp_path / "o").glob("*.tar"))
    large = [path for path in made if path.stat().st_size > limit]
    assert len(large) == 1 and [key for key, _ in read_tar(large[0])] == [names[30]]
    others = [path.stat().st_size for path in made if path not in large]
    assert len(others) > 1 and sum(others) / len(others) > 0.5 * limit


def test_equal_keys_of_several_shards_stay_apart_and_are_counted(tmp_path: Path) -> None:
    shards = [
        [("a", full_sample(1)), ("a-2", full_sample(2)), ("b", full_sample(3))],
        [("a", full_sample(4)), ("b", full_sample(5))],
    ]
    found = outcome("reshard", make_shards(tmp_path / "s", shards), tmp_path / "o", "--shard-size", 5)
    numbers = {"a": 1, "a-2": 2, "b": 3, "a-3": 4, "b-2": 5}
    assert read_folder(tmp_path / "o") == [(key, full_sample(n)) for key, n in numbers.items()]
    assert found["kept_as"] == {"renamed": 2}
    found = outcome("reshard", tmp_path / "s", tmp_path / "p", "--shard-size", 3)
    assert [key for key, _ in read_folder(tmp_path / "p")] == ["a", "a-2", "b", "a", "b"] and found["kept_as"] == {}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_strange_members_and_folders_in_names_are_read_right(tmp_path: Path, format: int) -> None:
    long = "folder/" + "x" * 200
    members = [
        ("README", b"no sample"),
        (f"{long}.jpg", b"1"),
        (f"{long}.txt", b"2"),
        ("__meta__/x.json", b"{}"),
        ("ä/b.JPG", b"3"),
        ("ä/b.cls.txt", b"4"),
        ("LICENSE", b"no sample"),
        ("../c.txt", b"5"),
    ]
    write_tar(tmp_path / "s/a.tar", members, format)
    outcome("reshard", tmp_path / "s", tmp_path / "o", "--shard-size", 10)
    assert read_folder(tmp_path / "o") == [
        (long, {"jpg": b"1", "txt": b"2"}),
        ("ä/b", {"jpg": b"3", "cls.txt": b"4"}),
        ("../c", {"txt": b"5"}),
    ]


def test_lost_samples_are_named_and_the_others_saved(tmp_path: Path) -> None:
    source = make_shards(
        tmp_path / "s",
        [
            [("a", full_sample(1)), ("b", full_sample(2)), ("a", full_sample(3)), ("c", full_sample(4))],
            [("d", full_sample(9)), ("e", full_sample(8))],
        ],
    )
    shard = source / "00001.tar"
    size = sum(512 + -(-len(content) // 512) * 512 for content in full_sample(9).values())
    shard.write_bytes(shard.read_bytes()[: size + 700])
    found = outcome("reshard", source, tmp_path / "o", "--shard-size", 2, status=1)
    assert [name for name, _ in found["lost_samples"]] == ["00000.tar#a", "00001.tar"]
    assert "truncated at byte" in found["lost_samples"][1][1] and f"{shard}" in found["lost_samples"][1][1]
    assert [key for key, _ in read_folder(tmp_path / "o")] == ["a", "b", "c"]


def test_a_shard_that_changed_after_the_scan_gives_an_error_not_other_bytes(tmp_path: Path) -> None:
    shard = numbered(tmp_path / "s", [5]) / "00000.tar"
    scan_shard(ShardToScan("scan", shard, "00000.tar", tmp_path / "spans"))
    start, length, _ = np.fromfile(tmp_path / "spans", dtype=SPAN)[2].tolist()
    file = os.open(shard, os.O_RDONLY)
    assert read_span(shard, file, start, length) == ("00002", full_sample(2))
    for content in (shard.read_bytes()[:start] + b"?" + shard.read_bytes()[start + 1 :], shard.read_bytes()[: start + 10]):
        shard.write_bytes(content)
        with pytest.raises(DataError, match="changed at byte"):
            read_span(shard, file, start, length)
    os.close(file)


def test_a_source_without_whole_samples_is_refused(tmp_path: Path) -> None:
    result = run("reshard", make_shards(tmp_path / "s", [[]]), tmp_path / "o", "--shard-size", 2)
    assert isinstance(result.exception, DataError) and "hold no sample" in str(result.exception)


@pytest.mark.parametrize(
    "options",
    [(), ("--shard-size", 5, "--shard-bytes", "1MB"), ("--shard-size", 5, "--seed", 1)],
    ids=["none", "both", "seed"],
)
def test_requests_without_meaning_are_refused(tmp_path: Path, options: tuple[object, ...]) -> None:
    result = run("reshard", numbered(tmp_path / "s", [2]), tmp_path / "o", *options)
    assert isinstance(result.exception, UserError) and not (tmp_path / "o").exists()


@pytest.mark.parametrize("size", ["a lot", "5XB", "10KB", "-1MB"])
def test_sizes_that_no_shard_can_have_are_refused(tmp_path: Path, size: str) -> None:
    result = run("reshard", numbered(tmp_path / "s", [2]), tmp_path / "o", f"--shard-bytes={size}")
    assert result.exit_code == 2 and "--shard-bytes" in result.output
