"""Greedy generation with the model of configs/1b.yaml in bf16: tokens per second by batch."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
from torch import nn

from benchmarks.gpu.batches import Words
from benchmarks.gpu.context import Context
from benchmarks.gpu.model_1b import config_1b
from megamoe.evaluate.greedy import greedy_decode
from megamoe.model.parameter import ExpertShard, info_of
from megamoe.model.vlm import VisionLanguageModel, layer_specs


def measure(context: Context) -> None:
    """Record new tokens per second over all rows, and seconds to the first one."""
    config = config_1b(context, 1)
    never_ends = Words(eos_id=-1, size=config.model.decoder.vocab_size)
    new = 4 if context.tiny else 64

    @torch.no_grad()
    def draw(_name: str, parameter: nn.Parameter, _seed: int) -> None:
        info = info_of(parameter)
        parameter.data = torch.empty(parameter.shape, device=context.device).normal_(info.fill, info.std)

    with mock.patch("megamoe.model.vlm.initialize", draw):
        model = VisionLanguageModel(layer_specs(config.model, never_ends.image_id), ExpertShard(), 0).eval()
    model.to(torch.bfloat16 if context.cuda else torch.float32)
    side = config.model.vision.image_size
    for rows in (1, 2) if context.tiny else (1, 16, 64):
        pixels = torch.randint(0, 256, (rows, side, side, 3), dtype=torch.uint8, device=context.device)
        decode = partial(greedy_decode, model, never_ends, pixels)
        first = context.seconds(partial(decode, max_new_tokens=1), repeats=3, warm_up=2)
        all_of_them = context.seconds(partial(decode, max_new_tokens=new), repeats=2, warm_up=1)
        each = (all_of_them - first) / (new - 1)
        figures = {"first_token_seconds": first, "next_token_seconds": each, "tokens_per_second": rows / each}
        context.record(f"batch {rows}", figures)
