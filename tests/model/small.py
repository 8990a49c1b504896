"""Small models and packed sequences for tests: random shapes, every parameter away from its special start value."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamoe.config import Config, parse_config
from megamoe.core.packed_batch import empty_text, write_sample
from megamoe.model.vlm import VisionLanguageModel, build_model

PAD, EOS, IMAGE = 0, 2, 3
FIRST_WORD = 4


def small_config(seed: int, **changes: Any) -> Config:
    """A random small model; ``changes`` are dotted keys with ``__`` for the dot, ``model__moe__top_k=1``."""
    draw = random.Random(seed)
    patch = draw.choice([4, 8])
    heads, experts = draw.choice([2, 4, 6]), draw.choice([2, 4, 6])
    tree: dict[str, Any] = {
        "run": {"seed": seed},
        "model": {
            # Large enough that each part of the model is seen in the logits.
            "init_std": 0.3,
            "attention": "sdpa",
            "vision": {
                "image_size": patch * draw.choice([1, 2, 3]),
                "patch_size": patch,
                "width": 8 * draw.choice([2, 3]),
                "depth": draw.choice([1, 2, 3]),
                "heads": draw.choice([1, 2, 4]),
                "mlp_width": draw.choice([20, 36]),
                "sparse_every": draw.choice([0, 1, 2]),
                "expert_width": draw.choice([8, 12]),
                "norm_eps": draw.choice([1e-6, 1e-3]),
            },
            "decoder": {
                "vocab_size": draw.choice([41, 64]),
                "width": draw.choice([16, 24]),
                "depth": draw.choice([1, 2, 4]),
                "heads": heads,
                "kv_heads": draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
                "head_dim": draw.choice([6, 8, 10]),
                "mlp_width": draw.choice([20, 36]),
                "sparse_every": draw.choice([1, 2]),
                "expert_width": draw.choice([8, 12]),
                "rope_theta": draw.choice([100.0, 1e4, 1e6]),
                "norm_eps": draw.choice([1e-6, 1e-3]),
            },
            "moe": {"experts": experts, "top_k": draw.randint(1, experts)},
        },
        "data": {"sequence_length": 64, "images_per_sequence": 4},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return parse_config(tree, source=f"small model {seed}")


def small_model(config: Config) -> VisionLanguageModel:
    """Build the model in eval mode, with random norms and biases: at 1 and 0 a missing one would not be noticed."""
    model = build_model(config, IMAGE)
    generator = torch.Generator().manual_seed(config.run.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty(parameter.shape).normal_(0.0, 0.3, generator=generator))
    return model.eval()


@dataclass(frozen=True)
class Pictured:
    """A sample: uint8 (H, W, 3) and its caption with the end of sequence."""

    pixels: Tensor
    words: list[int]


def random_samples(config: Config, count: int, seed: int) -> list[Pictured]:
    """Samples with captions of 1 to 6 words."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    side = config.model.vision.image_size
    samples = []
    for _ in range(count):
        words = [draw.randrange(FIRST_WORD, config.model.decoder.vocab_size) for _ in range(draw.randint(1, 6))]
        pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=generator)
        samples.append(Pictured(pixels, [*words, EOS]))
    return samples


def pack(samples: Sequence[Pictured], patches: int, length: int, images: int) -> tuple[Tensor, Tensor]:
    """One packed sequence: uint8 (1, I, H, W, 3), int64 (1, 3, L)."""
    text, end = empty_text(1, length, PAD), 0
    for number, sample in enumerate(samples, start=1):
        end = write_sample(text[0], end, number, IMAGE, patches, sample.words)
    pixels = torch.zeros(images, *samples[0].pixels.shape, dtype=torch.uint8)
    pixels[: len(samples)] = torch.stack([sample.pixels for sample in samples])
    return pixels.unsqueeze(0), torch.from_numpy(text)


def logits(model: VisionLanguageModel, pixels: Tensor, text_B3L: Tensor) -> Tensor:
    """Scores of all positions (B, L, V)."""
    state: tuple[Tensor, ...] = (pixels, text_B3L)
    for layer in list(model.layers)[:-1]:
        state = layer(state)
    return model.head.logits(state[0])
