"""Packed sequences: every token accounted for, every label the next token of the same sample."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.core.packed_batch import IGNORE
from megamoe.data.sample.pack import PackShape, SequenceBuilder
from megamoe.data.sample.tokenizer import Tokenizer

P, SLOTS = 4, 3


@settings(deadline=None)
@given(st.integers(P + 2, 40), st.lists(st.lists(st.integers(4, 300), min_size=1, max_size=30), min_size=1, max_size=6))
def test_a_sequence_is_its_samples_in_order(tokenizer: Tokenizer, length: int, captions: list[list[int]]) -> None:
    builder = SequenceBuilder(PackShape(length, SLOTS, 2, P), tokenizer)
    for n, caption in enumerate(captions):
        if not builder.fits(caption):
            break
        builder.next_picture[...] = n + 1
        builder.add(caption)
    builder.finish()
    taken = captions[: builder.samples]
    rest = captions[builder.samples :]
    used = sum(min(P + len(caption) + 1, length) for caption in taken)
    assert taken and used <= length
    if rest:  # greedy: the next one has no room
        assert len(taken) == SLOTS or used + P + len(rest[0]) + 1 > length
    ids, segments, labels = builder.text
    assert (segments[used:] == 0).all() and (ids[used:] == tokenizer.pad_id).all()
    for n, caption in enumerate(taken):
        here = np.flatnonzero(segments == n + 1)
        assert (np.diff(here) == 1).all()
        expected = [tokenizer.image_id] * P + caption[: length - P - 1] + [tokenizer.eos_id]
        assert ids[here].tolist() == expected
        assert labels[here].tolist() == [IGNORE] * (P - 1) + expected[P:] + [IGNORE]
    assert (labels[used:] == IGNORE).all()
    assert builder.targets == (labels != IGNORE).sum()
    assert builder.truncated == sum(len(caption) > length - P - 1 for caption in taken)
    assert builder.pixels[:, 0, 0, 0].tolist() == [n + 1 if n < len(taken) else 0 for n in range(SLOTS)]


def test_a_full_sequence_says_so(tokenizer: Tokenizer) -> None:
    builder = SequenceBuilder(PackShape(2 * P + 4, SLOTS, 2, P), tokenizer)
    builder.add([5])
    assert not builder.full and builder.fits([5]) and not builder.fits([5, 6])
    builder.add([5])
    assert builder.full and not builder.fits([5])
