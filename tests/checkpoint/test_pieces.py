"""Sharing pieces out to ranks, and the copy that is written in the background."""

from __future__ import annotations

import pytest
import torch

from megamoe.checkpoint.pieces import _Held, _share_out
from megamoe.checkpoint.snapshot import Snapshot

WHOLE = ("weight/a", 0, 10, 10, torch.float32)
HALVES = [("weight/b", 0, 6, 10, torch.float32), ("weight/b", 6, 4, 10, torch.float32)]


def test_replicas_are_written_once_and_parts_by_those_who_hold_them() -> None:
    shares, tensors = _share_out([[WHOLE, HALVES[0]], [WHOLE, HALVES[1]]])
    assert shares == [{"weight/a@0", "weight/b@0"}, {"weight/b@6"}]
    first, second = "rank-00000.safetensors", "rank-00001.safetensors"
    assert tensors["weight/a"].pieces == ((0, 10, first),)
    assert tensors["weight/b"].pieces == ((0, 6, first), (6, 4, second)) and tensors["weight/b"].size == 10


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (("weight/b", 7, 3, 10, torch.float32), "element 6 is covered by no rank or by two"),
        (("weight/b", 5, 5, 10, torch.float32), "element 6 is covered by no rank or by two"),
        (("weight/b", 6, 3, 10, torch.float32), "1 elements are covered by no rank"),
        (("weight/b", 6, 4, 11, torch.float32), "ranks differ in size or type"),
    ],
)
def test_what_is_not_covered_exactly_once_is_refused(wrong: _Held, what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        _share_out([[HALVES[0]], [wrong]])


def test_a_copy_stays_as_it_was_and_its_memory_is_used_again() -> None:
    live = {"one": torch.randn(1001), "two": torch.arange(7, dtype=torch.uint8), "three": torch.randn(3)}
    before = {name: tensor.clone() for name, tensor in live.items()}
    snapshot = Snapshot(torch.device("cpu"))
    copies, wait = snapshot.take(live)
    for tensor in live.values():
        tensor.zero_()
    wait()
    assert all(torch.equal(copies[name], before[name]) for name in live)
    again, _ = snapshot.take(live)
    assert all(again[name].data_ptr() == copies[name].data_ptr() and not again[name].any() for name in live)
