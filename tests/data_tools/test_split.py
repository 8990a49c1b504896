"""`megamoe data split` and the rule that it shares with training."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.core.errors import UserError
from megamoe.data.shards.held_out import bounds, held_out, key_hash
from tests.data_tools.shaping import numbered, outcome, read_folder, run


def test_the_hash_of_a_key_is_fixed_for_ever() -> None:
    digest = hashlib.blake2b("schön/00001".encode(), digest_size=8).digest()
    assert key_hash("schön/00001") == int.from_bytes(digest, "big")
    assert key_hash("000000000") == 0x3DAB83905ED66F9D


def test_every_sample_is_in_one_part_with_all_members(tmp_path: Path) -> None:
    source = numbered(tmp_path / "s", [150, 50])
    found = outcome("split", source, tmp_path / "o", "--names", "a,b,c", "--shares", "0.5,0.25,0.25")
    parts = {name: read_folder(tmp_path / "o" / name) for name in "abc"}
    assert sorted(chain(*parts.values()), key=lambda each: each[0]) == read_folder(source)
    assert found["kept_as"] == {name: len(samples) for name, samples in parts.items()}
    assert 75 <= len(parts["a"]) <= 125 and 30 <= len(parts["b"]) <= 70
    assert all([key for key, _ in samples] == sorted(key for key, _ in samples) for samples in parts.values())


def test_a_split_stays_when_shards_are_cut_anew(tmp_path: Path) -> None:
    source = numbered(tmp_path / "s", [70, 30])
    outcome("reshard", source, tmp_path / "r", "--shard-size", 17, "--shuffle")
    for name, shards in (("a", source), ("b", tmp_path / "r")):
        outcome("split", shards, tmp_path / name, "--shares", "0.8,0.2")
    for part in ("train", "validation"):
        keys = [{key for key, _ in read_folder(tmp_path / name / part)} for name in "ab"]
        assert keys[0] == keys[1] and len(keys[0]) > 5


def test_the_trainer_holds_out_what_the_tool_splits_off(tmp_path: Path) -> None:
    source = numbered(tmp_path / "s", [200])
    outcome("split", source, tmp_path / "o", "--shares", "0.9,0.1")
    keys = [key for key, _ in read_folder(source)]
    mask = held_out(np.array([key_hash(key) for key in keys], dtype=np.uint64), 0.1)
    assert [key for key, out in zip(keys, mask, strict=True) if out] == [
        k for k, _ in read_folder(tmp_path / "o/validation")
    ]


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_the_bound_is_exact_and_a_larger_share_holds_out_more(a: int, b: int, values: list[int]) -> None:
    small, large = sorted((a, b))
    edge = bounds([1 - Fraction(small, 10**6), Fraction(small, 10**6)])[0]
    hashes = [*values, min(edge, 2**64 - 1), max(edge - 1, 0), 0, 2**64 - 1]
    got = held_out(np.array(hashes, dtype=np.uint64), small / 10**6)
    assert got.tolist() == [value >= edge for value in hashes]
    assert not np.any(got & ~held_out(np.array(hashes, dtype=np.uint64), large / 10**6))


def test_nothing_and_everything_can_be_held_out() -> None:
    hashes = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert held_out(hashes, 0.0).tolist() == [False, False] and held_out(hashes, 1.0).tolist() == [True, True]


@pytest.mark.parametrize(
    ("names", "shares", "message"),
    [
        ("train,train", "0.5,0.5", "a name repeats"),
        ("train,../x", "0.5,0.5", "a name becomes a folder"),
        ("..,x", "0.5,0.5", "a name becomes a folder"),
        ("train,validation", "0.5", "1 for 2 names"),
        ("train,validation", "0.9,0.2", "their sum is 1.1"),
        ("train,validation", "1,0", "each must be above 0"),
        ("train,validation", "most,0.1", "not numbers"),
    ],
)
def test_what_is_no_split_is_refused(tmp_path: Path, names: str, shares: str, message: str) -> None:
    source = numbered(tmp_path / "s", [2])
    result = run("split", source, tmp_path / "o", "--names", names, "--shares", shares)
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert not (tmp_path / "o").exists()
