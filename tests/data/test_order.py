"""The order of samples: each once per epoch, from nothing but its arguments."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.core.errors import DataError
from megamoe.data.order.sample_order import (
    BLOCK,
    Anchor,
    SampleOrder,
    SampleRef,
    _keys,
    _Mixture,
    _shuffled_block,
    shuffled,
)

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)
SEEDS = st.integers(0, 2**70)


def make(
    counts: Sequence[Sequence[int]],
    seed: int = 0,
    lanes: int = 1,
    shards: int = 2,
    weights: Sequence[float] | None = None,
    anchors: Sequence[Anchor] | None = None,
) -> SampleOrder:
    return SampleOrder(
        [len(each) for each in counts],
        weights or [1.0] * len(counts),
        lambda source, shard: counts[source][shard],
        seed=seed,
        lanes=lanes,
        shuffle_shards=shards,
        anchors=anchors,
    )


def line(order: SampleOrder) -> Iterator[SampleRef]:
    """Return the samples of all lanes, position by position."""
    position = 0
    while True:
        yield order.locate(position % order.lanes, position // order.lanes)
        position += 1


def head(order: SampleOrder, length: int) -> list[SampleRef]:
    return [ref for ref, _ in zip(line(order), range(length), strict=False)]


@settings(deadline=None)
@given(COUNTS, SEEDS, st.integers(1, 9), st.integers(1, 10), st.integers(0, 3))
def test_each_epoch_has_each_sample_once(counts: list[int], seed: int, lanes: int, shards: int, number: int) -> None:
    size = sum(counts)
    refs = head(make([counts], seed, lanes, shards), (number + 1) * size)[number * size :]
    assert {ref.epoch for ref in refs} == {number}
    expected = [(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    assert sorted((ref.shard, ref.sample) for ref in refs) == expected


@settings(deadline=None, max_examples=25)
@given(st.lists(COUNTS, min_size=2, max_size=4), st.lists(st.floats(0.05, 9), min_size=4, max_size=4), SEEDS)
def test_each_source_goes_through_its_own_epochs(counts: list[list[int]], weights: list[float], seed: int) -> None:
    refs = head(make(counts, seed, 3, 2, weights[: len(counts)]), 2 * BLOCK // 3)
    for source, sizes in enumerate(counts):
        mine = [ref for ref in refs if ref.source == source]
        expected = sorted((shard, sample) for shard, count in enumerate(sizes) for sample in range(count))
        for epoch in range(len(mine) // len(expected)):
            part = mine[epoch * len(expected) : (epoch + 1) * len(expected)]
            assert {ref.epoch for ref in part} == {epoch}
            assert sorted((ref.shard, ref.sample) for ref in part) == expected


@pytest.mark.parametrize("weights", [[1, 1], [0.999, 0.001], [3, 2, 1], [1e-9, 1.0], [0.3] * 3])
def test_the_weights_are_met_within_each_block_and_roughly_everywhere(weights: list[float]) -> None:
    order = make([[1000]] * len(weights), 5, 4, 1, weights)
    refs = head(order, BLOCK)
    counts = Counter(ref.source for ref in refs)
    for source, weight in enumerate(weights):
        share = weight / sum(weights) * BLOCK
        assert abs(counts[source] - max(1, share)) <= 1
        half = sum(ref.source == source for ref in refs[: BLOCK // 2])
        assert abs(half - counts[source] / 2) < 5 * max(1, np.sqrt(counts[source])) / 2


@settings(deadline=None)
@given(COUNTS, st.integers(0, 99), st.integers(1, 7), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_how_it_is_asked(
    counts: list[int], seed: int, lanes: int, shards: int, shuffle: random.Random
) -> None:
    order = make([counts], seed, lanes, shards)
    wanted = [(lane, k) for lane in range(lanes) for k in range(3 * sum(counts) // lanes)]
    first = {each: order.locate(*each) for each in wanted}
    shuffle.shuffle(wanted)
    np.random.seed(1)
    again = make([counts], seed, lanes, shards)
    assert {each: again.locate(*each) for each in wanted} == first


@settings(deadline=None)
@given(st.lists(COUNTS, min_size=1, max_size=3), st.integers(0, 99), st.integers(1, 7), st.integers(1, 7))
def test_the_line_is_the_same_for_any_number_of_lanes(counts: list[list[int]], seed: int, lanes: int, others: int) -> None:
    assert head(make(counts, seed, lanes), 300) == head(make(counts, seed, others), 300)


@settings(deadline=None)
@given(st.lists(COUNTS, min_size=1, max_size=3), SEEDS, st.integers(1, 7), st.integers(1, 5), st.integers(0, 500))
def test_from_an_anchor_the_order_goes_on_and_what_lies_before_is_never_counted(
    counts: list[list[int]], seed: int, lanes: int, shards: int, position: int
) -> None:
    order = make(counts, seed, lanes, shards)
    expected = head(order, position + 300)
    anchors = order.anchors(position % lanes, position // lanes)
    asked: list[tuple[int, int]] = []

    def count(source: int, shard: int) -> int:
        asked.append((source, shard))
        return counts[source][shard]

    again = SampleOrder(
        [len(each) for each in counts], [1.0] * len(counts), count,
        seed=seed, lanes=lanes, shuffle_shards=shards, anchors=anchors,
    )  # fmt: skip
    refs = [again.locate(q % lanes, q // lanes) for q in range(position, position + 300)]
    assert refs == expected[position:]
    # at most the window of the anchor itself comes before what is read
    epochs = {(ref.source, ref.epoch) for ref in refs}
    assert len(asked) <= sum((2 + sum(s == source for s, _ in epochs)) * len(each) for source, each in enumerate(counts))


def test_epochs_and_seeds_differ() -> None:
    each = [
        head(make([[50, 30, 20]], seed, 4, 2), 300)[n * 100 : n * 100 + 100] for seed in (0, 1, 2**64) for n in (0, 1, 2)
    ]
    orders = [[ref[2:] for ref in refs] for refs in each]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_the_order_is_the_one_of_earlier_versions() -> None:
    # fmt: off
    assert [tuple(ref[2:]) for ref in head(make([[3, 2, 4]], 7, 2, 2), 9)] == [
        (0, 2), (2, 1), (0, 1), (2, 2), (2, 3), (0, 0), (2, 0), (1, 0), (1, 1),
    ]
    assert [tuple(ref) for ref in head(make([[3, 2], [4]], 7, 2, 2, [2, 1]), 9)] == [
        (1, 0, 0, 3), (0, 0, 1, 0), (0, 0, 1, 1), (0, 0, 0, 2), (0, 0, 0, 0), (0, 0, 0, 1), (0, 1, 1, 1),
        (0, 1, 1, 0), (0, 1, 0, 2),
    ]
    # fmt: on


@settings(deadline=None)
@given(st.integers(1, 3000), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_shuffled_is_a_permutation(size: int, keys: list[int]) -> None:
    assert sorted(shuffled(index, size, keys) for index in range(size)) == list(range(size))


def test_permutations_of_different_keys_are_spread_evenly() -> None:
    rng = random.Random(0)
    keys = [[rng.getrandbits(64) for _ in range(6)] for _ in range(12_000)]
    seen = Counter(tuple(shuffled(i, 4, each) for i in range(4)) for each in keys)
    assert len(seen) == 24 and min(seen.values()) > 400 and max(seen.values()) < 600, "500 of each are due"


def test_a_window_touches_its_shards_only() -> None:
    refs = head(make([[100] * 50], 0, 1, 5), 5000)
    assert all(len({ref.shard for ref in refs[at : at + 500]}) == 5 for at in range(0, 5000, 500))
    assert [ref.shard for ref in refs[::100]] != sorted(ref.shard for ref in refs[::100])


def test_a_source_of_empty_shards_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(DataError, match="no shard of source 0 has a sample to train on"):
        make([[0, 0, 0]]).locate(0, 0)


def test_starting_far_into_two_billion_samples_looks_at_one_window() -> None:
    asked: list[int] = []

    def count(source: int, shard: int) -> int:
        asked.append(shard)
        return 10_000

    shards = 217_000
    anchor = Anchor(3 * 27_125 + 9_000, (3 * 217_000 + 9_000 * 8) * 10_000)
    order = SampleOrder([shards], [1.0], count, seed=3, lanes=4096, shuffle_shards=8, anchors=[anchor])
    assert order.locate(0, anchor.start // 4096 + 1).epoch == 3
    assert len(asked) == 8


def test_forgetting_what_was_passed_changes_nothing_and_keeps_memory_bounded() -> None:
    counts = [[3] * 700, [1] * 40]
    whole, forgetful = make(counts, 5, 4), make(counts, 5, 4)
    for k in range(9000):
        for lane in range(4):
            assert whole.locate(lane, k) == forgetful.locate(lane, k)
        forgetful.forget_before(0, k)
        assert whole.anchors(0, k) == forgetful.anchors(0, k)
    assert len(whole._sources[0]._starts) > 1000 and all(len(each._starts) < 600 for each in forgetful._sources)


def test_shards_in_use_are_those_of_the_windows_from_the_first_lane_to_the_last() -> None:
    order = make([[10] * 20], lanes=5, shards=4)  # 40 samples per window, 8 of each lane
    order.locate(4, 23)
    assert order.shards_between((0, 0), (7, 4)) == 4
    assert order.shards_between((0, 0), (8, 0)) == 8
    assert order.shards_between((7, 4), (23, 4)) == 12


def test_a_source_whose_samples_only_keep_their_places_is_an_error_and_no_endless_search() -> None:
    def order(aside: set[int]) -> SampleOrder:
        return SampleOrder(
            [3], [1.0], lambda _, n: [0, 4, 5][n], seed=0, lanes=2, shuffle_shards=2, is_read=lambda _, n: n not in aside
        )

    assert len(head(order({1}), 500)) == 500
    with pytest.raises(DataError, match="no shard of source 0 has a sample to train on"):
        head(order({1, 2}), 500)


@pytest.mark.parametrize("seed", [0, 2**70])
def test_a_block_at_once_is_shuffled_as_place_by_place(seed: int) -> None:
    keys = _keys(seed, 2, 0, 7, 0)
    assert _shuffled_block(keys).tolist() == [shuffled(place, BLOCK, keys) for place in range(BLOCK)]


def test_lanes_that_have_drifted_far_apart_do_not_compute_blocks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    block = _Mixture._block
    monkeypatch.setattr(_Mixture, "_block", lambda self, number: computed.append(number) or block(self, number))
    order = make([[500_000], [300_000]], lanes=64, weights=[2, 1])
    for k in range(300):
        for lane in range(64):
            order.locate(lane, k + lane * 256)  # each lane is a block behind the next
    assert sorted(computed) == list(range(65))


def test_too_many_sources_are_refused() -> None:
    with pytest.raises(DataError, match=r"^data.train: 257 sources; at most 256"):
        make([[1]] * 257)
