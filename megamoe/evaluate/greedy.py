"""Greedy decoding of a batch: the encoder and the prompt run once, then one token per step from cached keys and values.

Rows are samples, not packed sequences: ``[image] * P + prompt``, padded on the left so that all rows end together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megamoe.core.packed_batch import empty_text, write_sample
from megamoe.model.vlm import VisionLanguageModel


class Vocabulary(Protocol):
    """What decoding needs of a vocabulary; a :class:`megamoe.data.sample.tokenizer.Tokenizer` has it."""

    image_id: int
    pad_id: int
    eos_id: int
    size: int


def greedy_decode(
    model: VisionLanguageModel,
    vocabulary: Vocabulary,
    pixels_BHWC: Tensor,
    prompts: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 64,
) -> list[list[int]]:
    """Append the likeliest next token to each row until its end of sequence or ``max_new_tokens``.

    Picture tokens, and rows of the embedding beyond the vocabulary's pieces, have no text and are never chosen.

    Args:
        model: The whole model, in eval mode.
        vocabulary: Special ids and number of pieces.
        pixels_BHWC: uint8, one picture per row, on the device of the model.
        prompts: Ids that follow the picture, per row; lengths may differ. Default: none.
        max_new_tokens: Most ids that are added to a row.

    Returns:
        New ids of each row, without the prompt and without the end of sequence.
    """
    rows = len(pixels_BHWC)
    prompts = prompts if prompts is not None else [()] * rows
    steps: list[Tensor] = []
    with torch.inference_mode():
        text_B3L = left_padded_text(prompts, model.patch_embedding.patches, vocabulary).to(pixels_BHWC.device)
        scores_BV, state = model.prefill(pixels_BHWC, text_B3L, max_new_tokens)
        done_B = torch.zeros(rows, dtype=torch.bool, device=pixels_BHWC.device)
        for step in range(max_new_tokens):
            if step:
                scores_BV = model.decode_step(steps[-1], ~done_B, state)
            next_B = _best(scores_BV, vocabulary)
            # A row that has ended stays ended while the others continue.
            next_B = next_B.masked_fill(done_B, vocabulary.eos_id)
            steps.append(next_B)
            done_B = done_B | (next_B == vocabulary.eos_id)
            if bool(done_B.all()):
                break
    ids = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in range(rows)]
    return [row[: row.index(vocabulary.eos_id)] if vocabulary.eos_id in row else row for row in ids]


def left_padded_text(prompts: Sequence[Sequence[int]], patches: int, vocabulary: Vocabulary) -> Tensor:
    """Lay out one sample per row, its picture and its prompt, so that all rows end together.

    Returns:
        Packed text, int64 (B, 3, L), without labels.
    """
    length = patches + max((len(prompt) for prompt in prompts), default=0)
    text_B3L = empty_text(len(prompts), length, vocabulary.pad_id)
    for row_3L, prompt in zip(text_B3L, prompts, strict=True):
        start = length - patches - len(prompt)
        write_sample(row_3L, start, 1, vocabulary.image_id, patches, prompt, labelled=False)
    return torch.from_numpy(text_B3L)


def _best(scores_BV: Tensor, vocabulary: Vocabulary) -> Tensor:
    scores_BV[:, vocabulary.image_id] = -torch.inf
    return scores_BV[:, : vocabulary.size].argmax(-1)
