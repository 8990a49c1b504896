"""The order of samples: each once per epoch, from nothing but its arguments."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.data.order import SampleOrder, SampleRef

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


def epoch(order: SampleOrder, number: int) -> list[SampleRef]:
    positions = range(number * order.samples, (number + 1) * order.samples)
    return [order.locate(position % order.lanes, position // order.lanes) for position in positions]


@settings(deadline=None)
@given(COUNTS, st.integers(0, 2**70), st.integers(1, 9), st.integers(1, 100), st.integers(0, 3))
def test_each_epoch_has_each_sample_once(counts: list[int], seed: int, lanes: int, window: int, number: int) -> None:
    refs = epoch(SampleOrder(counts, seed, lanes, window), number)
    assert {ref.epoch for ref in refs} == {number}
    expected = [(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    assert sorted((ref.shard, ref.sample) for ref in refs) == expected


@settings(deadline=None)
@given(COUNTS, st.integers(0, 99), st.integers(1, 7), st.integers(1, 50), st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_how_it_is_asked(
    counts: list[int], seed: int, lanes: int, window: int, shuffle: random.Random
) -> None:
    order = SampleOrder(counts, seed, lanes, window)
    wanted = [(lane, k) for lane in range(lanes) for k in range(3 * order.samples // lanes)]
    first = {each: order.locate(*each) for each in wanted}
    shuffle.shuffle(wanted)
    np.random.seed(1)
    again = SampleOrder(counts, seed, lanes, window)
    assert {each: again.locate(*each) for each in wanted} == first


@settings(deadline=None)
@given(COUNTS, st.integers(0, 99), st.integers(1, 7), st.integers(1, 7))
def test_the_stream_is_the_same_for_any_number_of_lanes(counts: list[int], seed: int, lanes: int, others: int) -> None:
    assert epoch(SampleOrder(counts, seed, lanes, 16), 1) == epoch(SampleOrder(counts, seed, others, 16), 1)


def test_epochs_and_seeds_differ() -> None:
    counts = [50, 30, 20]
    each = [epoch(SampleOrder(counts, seed, 4, 32), n) for seed in (0, 1, 2**64) for n in (0, 1, 2)]
    orders = [[ref[1:] for ref in refs] for refs in each]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_the_order_is_the_one_of_earlier_versions() -> None:
    order = SampleOrder([3, 2, 4], 7, 2, 4)
    assert [order.locate(q % 2, q // 2)[1:] for q in range(9)] == [
        *((2, 0), (1, 1), (2, 1), (1, 0)),
        *((2, 2), (2, 3), (0, 0), (0, 1)),
        (0, 2),
    ]


def test_windows_touch_few_shards() -> None:
    order = SampleOrder([100] * 50, 0, 1, 200)
    refs = epoch(order, 0)
    assert all(len({ref.shard for ref in refs[at : at + 200]}) <= 3 for at in range(0, 5000, 200))
    assert [ref.shard for ref in refs[::100]] != sorted(ref.shard for ref in refs[::100])


def test_starting_far_into_a_large_data_set_is_quick_and_small() -> None:
    order = SampleOrder([10_000] * 40_000, 3, 4096, 16_384)
    assert order.samples == 400_000_000
    assert order.locate(4095, 250_000).epoch == 2
