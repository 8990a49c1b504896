"""Decoding with cached keys and values says what decoding without them would say."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megamoe.config import Config
from megamoe.core.packed_batch import IGNORE
from megamoe.evaluate.greedy import greedy_decode
from megamoe.model.moe import Router
from megamoe.model.vlm import VisionLanguageModel
from tests.model.small import EOS, FIRST_WORD, IMAGE, PAD, logits, small_config, small_model

NEAR = 1e-4  # two best scores this close are a tie: rounding may decide either way


@dataclass(frozen=True)
class Ids:
    """Special ids of the small models; ``size`` pieces have text."""

    size: int
    image_id: int = IMAGE
    pad_id: int = PAD
    eos_id: int = EOS


def recompute(
    model: VisionLanguageModel, config: Config, ids: Ids, pixels: Tensor, prompt: list[int], most: int
) -> list[int] | None:
    """One sample, everything anew for each token; None if there was a tie."""
    new: list[int] = []
    for _ in range(most):
        row = [IMAGE] * config.model.vision.patches + prompt + new
        text = torch.tensor([[row, [1] * len(row), [IGNORE] * len(row)]])
        scores = logits(model, pixels[None, None], text)[0, -1]
        scores[IMAGE] = -torch.inf
        best = scores[: ids.size].topk(2)
        if best.values[0] - best.values[1] < NEAR:
            return None
        if best.indices[0] == EOS:
            break
        new.append(int(best.indices[0]))
    return new


def make(seed: int, **changes: object) -> tuple[Config, VisionLanguageModel, Ids, Tensor]:
    config = small_config(seed, **changes)
    model = small_model(config)
    side = config.model.vision.image_size
    pixels = torch.randint(0, 256, (5, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return config, model, Ids(config.model.decoder.vocab_size - 3), pixels


def favour_the_end(model: VisionLanguageModel) -> None:
    """So that rows end, and at different steps."""
    head = model.head
    with torch.no_grad():
        head.out.weight[EOS] *= 2.0


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_cached_decoding_equals_recomputing_everything_at_each_step(seed: int) -> None:
    config, model, ids, pixels = make(seed)
    favour_the_end(model)
    draw = random.Random(seed)
    vocabulary = config.model.decoder.vocab_size
    prompts = [[draw.randrange(FIRST_WORD, vocabulary) for _ in range(draw.choice([0, 1, 4]))] for _ in range(5)]
    for case in ([[]] * 5, [prompts[1]] * 5, prompts):
        decoded = greedy_decode(model, ids, pixels, case, max_new_tokens=9)
        expected = [recompute(model, config, ids, *pair, 9) for pair in zip(pixels, case, strict=True)]
        assert sum(row is not None for row in expected) >= 3
        for own, other in zip(decoded, expected, strict=True):
            assert other is None or own == other


def test_the_small_models_cover_what_the_decoder_can_be() -> None:
    decoders = [small_config(seed).model.decoder for seed in range(12)]
    assert {decoder.sparse_every for decoder in decoders} == {1, 2}
    assert any(decoder.sparse_every == 2 and decoder.depth > 1 for decoder in decoders), "sparse and dense in one model"
    assert any(1 < decoder.kv_heads < decoder.heads for decoder in decoders), "grouped queries"


@pytest.mark.parametrize("seed", range(3))
def test_captions_do_not_depend_on_the_batch(seed: int) -> None:
    _, model, ids, pixels = make(seed)
    favour_the_end(model)
    together = greedy_decode(model, ids, pixels, max_new_tokens=9)
    alone = [greedy_decode(model, ids, picture[None], max_new_tokens=9)[0] for picture in pixels]
    assert together == alone


def test_decoding_ends_as_soon_as_all_rows_have_ended() -> None:
    _, model, ids, pixels = make(0)
    head = model.head
    calls: list[Tensor] = []
    model.decoder_layers[0].block.register_forward_hook(lambda _m, _i, out: calls.append(out[0]))
    with torch.no_grad():
        head.norm.weight.zero_()  # all scores are zero: the first piece wins
    assert greedy_decode(model, Ids(ids.size, eos_id=0, pad_id=1), pixels, max_new_tokens=50) == [[]] * 5
    assert len(calls) == 1


def test_at_most_max_new_tokens_are_added() -> None:
    _, model, ids, pixels = make(1)
    never = Ids(ids.size, eos_id=ids.size + 1)  # beyond the pieces: cannot be chosen
    for most in (0, 1, 7):
        assert [len(row) for row in greedy_decode(model, never, pixels, max_new_tokens=most)] == [most] * 5


@pytest.mark.parametrize("seed", range(3))
def test_ids_without_text_are_never_generated(seed: int) -> None:
    config, model, ids, pixels = make(seed)
    head = model.head
    with torch.no_grad():
        # Rows of the picture token and of those beyond the pieces are by far the likeliest, one way or the other.
        head.out.weight[IMAGE] *= 100
        head.out.weight[ids.size :] *= 100
    rows = greedy_decode(model, ids, pixels, max_new_tokens=9)
    assert config.model.decoder.vocab_size > ids.size
    assert all(id_ != IMAGE and id_ < ids.size for row in rows for id_ in row)


def test_rows_that_have_ended_visit_no_expert() -> None:
    _, model, ids, pixels = make(4, model__decoder__sparse_every=1, model__vision__sparse_every=0)
    favour_the_end(model)
    counts: list[int] = []
    router = next(module for layer in model.decoder_layers for module in layer.modules() if isinstance(module, Router))
    router.register_forward_hook(lambda _m, _i, out: counts.append(int(out.counts_E.sum()) // router.top_k))
    rows = greedy_decode(model, ids, pixels, max_new_tokens=9)
    lengths = [len(row) for row in rows]
    assert min(lengths) < max(lengths), "rows end at different steps"
    steps = counts[1:]  # the first is the prompt
    # In step n there are the rows that have more than n tokens, the end of sequence counted.
    assert steps == [sum(length > step for length in lengths) for step in range(len(steps))]
