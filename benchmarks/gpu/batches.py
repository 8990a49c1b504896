"""Make packed batches in memory, the same on every machine: real packing, random pictures and words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megamoe.config import Config
from megamoe.core.packed_batch import PackedBatch
from megamoe.data.sample.pack import PackShape, SequenceBuilder
from megamoe.parallel.deepspeed.engine import MicroBatch


@dataclass
class Words:
    """The ids that packing and decoding need, in place of a tokenizer."""

    image_id: int = 3
    pad_id: int = 0
    eos_id: int = 2
    size: int = 384


FIRST_WORD = 4


def micro_batches(config: Config, count: int, rows: int, seed: int, longest: int | None = None) -> list[MicroBatch]:
    """Draw ``count`` micro-batches of ``rows`` sequences.

    Captions have between ``longest / 2`` and ``longest`` words; by default ``longest`` is what fills a sequence. Pictures
    are coarse squares of colour, because all noise looks alike to a model.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    data, vision = config.data, config.model.vision
    shape = PackShape(data.sequence_length, data.images_per_sequence, vision.image_size, vision.patches)
    most = longest or max(2, data.sequence_length // data.images_per_sequence - vision.patches - 1)
    side, last_word = vision.image_size, min(Words.size, config.model.decoder.vocab_size)
    batches = []
    for _ in range(count):
        pixels, text = [], []
        for _ in range(rows):
            builder = SequenceBuilder(shape, Words())
            while True:
                words = draw.integers(FIRST_WORD, last_word, draw.integers(most // 2, most + 1))
                if not builder.fits(words.tolist()):
                    break
                coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                builder.next_picture[:] = coarse.repeat(side // 4, 0).repeat(side // 4, 1)[:side, :side]
                builder.add(words.tolist())
            builder.finish()
            pixels.append(torch.from_numpy(builder.pixels))
            text.append(torch.from_numpy(builder.text))
        batches.append((torch.stack(pixels), torch.stack(text)))
    return batches


def targets(batches: list[MicroBatch]) -> int:
    """Count the positions with a label."""
    return sum(PackedBatch.of(text).targets for _, text in batches)


def tokens(batches: list[MicroBatch]) -> int:
    """Count the tokens that are not padding."""
    return sum(PackedBatch.of(text).tokens for _, text in batches)
