"""The FLOPs that a config foretells are those that torch counts while the model runs (all but attention scores)."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megamoe.config import Config
from megamoe.core.packed_batch import PackedBatch, empty_text
from megamoe.model.size import model_size
from megamoe.model.vlm import build_model
from tests.training import small_config

IMAGE = 3


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_flops_are_those_that_torch_counts(top_k: int) -> None:
    tree = small_config(model={"moe": {"top_k": top_k}, "attention": "sdpa"})
    tree["data"] |= {"train": [], "tokenizer": None}
    config = Config.model_validate(tree)
    vision, decoder, data = config.model.vision, config.model.decoder, config.data
    length, pictures = data.sequence_length, data.images_per_sequence
    text = empty_text(1, length, 7)
    ids, segments, labels = PackedBatch.of(text[0])
    share = length // pictures
    for picture in range(pictures):
        begin = picture * share
        ids[begin : begin + vision.patches] = IMAGE
        segments[begin : begin + share] = picture + 1
        labels[begin + vision.patches : begin + share] = 7  # as many scored positions as text
    pixels = torch.zeros(1, pictures, vision.image_size, vision.image_size, 3, dtype=torch.uint8)
    model = build_model(config, IMAGE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels, torch.from_numpy(text))
    # on a CPU torch does not count the products within attention: two per pair of a query and a key
    queries = decoder.heads * decoder.head_dim
    scores = 4 * (length / pictures / 2) * queries * length * decoder.depth
    scores += 4 * vision.patches * vision.width * vision.patches * pictures * vision.depth
    expected = sum(layer.flops for layer in model_size(config).layers) - scores
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01), "biases and router are the rest"
