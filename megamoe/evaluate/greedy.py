"""Greedy decoding of a batch: the encoder and the prompt run once, then one token per step from cached keys and values.

Rows are samples, not packed sequences: ``[image] * P + prompt``, padded on the left so that all rows end together. The
blocks are those of training, called without their layers, which know nothing of caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from megamoe.model.attention import packed_causal_mask, segment_positions
from megamoe.model.batch import IGNORE
from megamoe.model.decoder import DecoderBlock, KVCache, rotary
from megamoe.model.stack import DecoderLayer, HeadLayer, MergeLayer, PictureLayer, Stack


class Vocabulary(Protocol):
    """The ids that decoding has to know; a :class:`megamoe.data.sample.tokenizer.Tokenizer` has them."""

    image_id: int
    pad_id: int
    eos_id: int
    size: int


def greedy_decode(
    stack: Stack,
    vocabulary: Vocabulary,
    pixels_BHWC: Tensor,
    prompts: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 64,
) -> list[list[int]]:
    """The likeliest next token, again and again, until the end of sequence or ``max_new_tokens``.

    Picture tokens and rows of the embedding that stand for no piece are never chosen: they have no text.

    Args:
        stack: The whole model, in eval mode.
        vocabulary: Special ids and number of pieces.
        pixels_BHWC: uint8, one picture per row, on the device of the model.
        prompts: Ids that follow the picture, per row; they may differ in length. Default: none.
        max_new_tokens: Most ids that are added to a row.

    Returns:
        New ids of each row, without the prompt and without the end of sequence.
    """
    B, height, width, _ = pixels_BHWC.shape
    prompts = prompts if prompts is not None else [()] * B
    with torch.inference_mode():
        text_B3L = _left_padded(prompts, _patches(stack, height, width), vocabulary).to(pixels_BHWC.device)
        L = text_B3L.shape[2]
        caches = _caches(stack, B, L + max_new_tokens)
        hidden_BLD = hidden_states(stack, pixels_BHWC, text_B3L, caches)
        # A later step sees the keys of the row's own sample, not those of its padding.
        visible_BL = F.pad(text_B3L[:, 1] > 0, (0, max_new_tokens), value=True)
        position_B = segment_positions(text_B3L[:, 1])[:, -1]
        done_B = torch.zeros(B, dtype=torch.bool, device=pixels_BHWC.device)
        steps: list[Tensor] = []
        for step in range(max_new_tokens):
            if step:
                visible_B11L = visible_BL[:, None, None, : L + step]
                hidden_BLD = _next(stack, steps[-1], position_B + step, ~done_B, visible_B11L, caches)
            next_B = _best(stack, hidden_BLD[:, -1], vocabulary)
            # A row that has ended says nothing more; the others go on beside it.
            next_B = next_B.masked_fill(done_B, vocabulary.eos_id)
            steps.append(next_B)
            done_B = done_B | (next_B == vocabulary.eos_id)
            if bool(done_B.all()):
                break
    rows = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in range(B)]
    return [row[: row.index(vocabulary.eos_id)] if vocabulary.eos_id in row else row for row in rows]


def hidden_states(stack: Stack, pixels_BHWC: Tensor, text_B3L: Tensor, caches: Sequence[KVCache] | None = None) -> Tensor:
    """Activations (B, L, D) ahead of the head, for one picture per row; keys and values go to ``caches`` if given.

    Attention takes a dense mask on any device: rows are short, and a compiled kernel would be built anew for each
    length.
    """
    segments_BL = text_B3L[:, 1]
    mask = packed_causal_mask(text_B3L, "sdpa")
    positions_BL = segment_positions(segments_BL)
    state: tuple[Tensor, ...] = (pixels_BHWC.unsqueeze(1), text_B3L)
    waiting = iter(caches or ())
    for layer in stack.layers:
        if isinstance(layer, DecoderLayer):
            angles = rotary(positions_BL, layer.decoder, state[0].dtype)
            hidden_BLD = layer.block(state[0], angles, segments_BL > 0, mask, next(waiting, None))[0]
            state = (hidden_BLD, *state[1:])
        elif not isinstance(layer, HeadLayer):
            state = layer(state)
    return state[0]


def _next(
    stack: Stack, ids_B: Tensor, position_B: Tensor, alive_B: Tensor, visible_B11L: Tensor, caches: Sequence[KVCache]
) -> Tensor:
    """One more token per row -> its activations (B, 1, D). Rows that are not alive visit no expert."""
    (merge,) = (layer for layer in stack.layers if isinstance(layer, MergeLayer))
    hidden_B1D = F.embedding(ids_B, merge.tokens).unsqueeze(1)
    layers = [layer for layer in stack.layers if isinstance(layer, DecoderLayer)]
    angles = rotary(position_B.unsqueeze(1), layers[0].decoder, hidden_B1D.dtype)
    for layer, cache in zip(layers, caches, strict=True):
        hidden_B1D = layer.block(hidden_B1D, angles, alive_B.unsqueeze(1), visible_B11L, cache)[0]
    return hidden_B1D


def _best(stack: Stack, hidden_BD: Tensor, vocabulary: Vocabulary) -> Tensor:
    head = stack.layers[-1]
    assert isinstance(head, HeadLayer)
    scores_BV = head.logits(hidden_BD).float()
    scores_BV[:, vocabulary.image_id] = -torch.inf
    return scores_BV[:, : vocabulary.size].argmax(-1)


def _left_padded(prompts: Sequence[Sequence[int]], patches: int, vocabulary: Vocabulary) -> Tensor:
    """Ids, segment ids (1, padding 0) and labels (none) of the rows, int64 (B, 3, L)."""
    length = patches + max((len(prompt) for prompt in prompts), default=0)
    text_B3L = torch.zeros(len(prompts), 3, length, dtype=torch.int64)
    text_B3L[:, 0], text_B3L[:, 2] = vocabulary.pad_id, IGNORE
    for row, prompt in zip(text_B3L, prompts, strict=True):
        start = length - patches - len(prompt)
        row[0, start:] = torch.tensor([vocabulary.image_id] * patches + list(prompt))
        row[1, start:] = 1
    return text_B3L


def _caches(stack: Stack, rows: int, length: int) -> list[KVCache]:
    caches = []
    for block in _decoder(stack):
        attention = block.attention
        shape = (rows, attention.kv_heads, length, attention.head_dim)
        like = attention.k.weight
        caches.append(KVCache(like.new_zeros(shape), like.new_zeros(shape)))
    return caches


def _decoder(stack: Stack) -> list[DecoderBlock]:
    blocks = [layer.block for layer in stack.layers if isinstance(layer, DecoderLayer)]
    return [block for block in blocks if isinstance(block, DecoderBlock)]


def _patches(stack: Stack, height: int, width: int) -> int:
    first = stack.layers[0]
    assert isinstance(first, PictureLayer)
    return (height // first.embed.patch_size) * (width // first.embed.patch_size)
