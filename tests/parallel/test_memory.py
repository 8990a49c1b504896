"""The activations that the prediction counts are those that autograd saves, operation by operation."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.config import Config, load_config
from megamoe.model import decoder as decoder_module
from megamoe.model import experts as experts_module
from megamoe.model import moe as moe_module
from megamoe.model import vision as vision_module
from megamoe.model.batch import announce_labels
from megamoe.model.parameter import ExpertShard
from megamoe.model.size import model_size
from megamoe.model.vlm import VisionLanguageModel, layer_specs
from megamoe.parallel.layout import plan_layout
from megamoe.parallel.memory import _saved, predict_memory
from tests.training import ROOT

ROWS, IMAGE = 2, 3
ALONE = ["parallel.pipeline=1", "parallel.expert=1", f"train.micro_batch={ROWS}", f"train.global_batch={2 * ROWS}"]


class Attention(torch.autograd.Function):
    """What a kernel keeps: queries, keys, values and the result."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, _mask: object) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


class Product(torch.autograd.Function):
    """What the grouped product keeps, in any number format."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return rows.new_empty(rows.shape[0], weight.shape[1])


def saved_by_layer(config: Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of the distinct tensors that the forward pass of a GPU saves, on the meta device."""
    for module in (decoder_module, vision_module):
        monkeypatch.setattr(module, "attend", Attention.apply)
    monkeypatch.setattr(experts_module, "grouped_linear", Product.apply)
    monkeypatch.setattr(moe_module, "_keeps_padding", lambda x: True)
    data, vision = config.data, config.model.vision
    each = data.sequence_length // data.images_per_sequence
    with torch.device("meta"):
        model = VisionLanguageModel(layer_specs(config.model, IMAGE), ExpertShard(), None).to(
            torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        )
        pixels = torch.empty(ROWS, data.images_per_sequence, vision.image_size, vision.image_size, 3, dtype=torch.uint8)
        text = torch.empty(ROWS, 3, data.sequence_length, dtype=torch.int64)
    announce_labels(text, ROWS * data.images_per_sequence * (each - vision.patches))
    seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept, sizes, name = [], defaultdict(int), ""

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(tensor)  # or its number would be another's
            sizes[name] += storage.nbytes()
        return tensor

    state: tuple[Tensor, ...] = (pixels, text)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for spec, layer in zip(model.specs, model.layers, strict=True):
            name = spec.name
            state = layer(state)
    return sizes


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("changes", [[], ["model.decoder.sparse_every=2"]])
def test_blocks_save_what_is_predicted(precision: str, changes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs/1b.yaml", [*ALONE, f"train.precision={precision}", *changes])
    saved = saved_by_layer(config, monkeypatch)
    width = 2 if precision == "bf16" else 4
    for layer in model_size(config).layers:
        if layer.name != "head":  # its scores come and go within it
            predicted = ROWS * _saved(config.model, config.data, layer, width)
            assert saved[layer.name] == pytest.approx(predicted, rel=0.05), layer.name


def test_recomputation_keeps_block_inputs_and_one_block_in_full() -> None:
    configs = {
        mode: load_config(ROOT / "configs/1b.yaml", [*ALONE, f"parallel.recompute={mode}"])
        for mode in ("none", "block", "offload")
    }
    layout = plan_layout(configs["none"], 1)
    none, block, offload = (predict_memory(config, layout, 0).activations for config in configs.values())
    vision, decoder, data = (configs["none"].model.vision, configs["none"].model.decoder, configs["none"].data)
    patches = vision.patches * data.images_per_sequence
    inputs = vision.depth * patches * vision.width + decoder.depth * data.sequence_length * decoder.width
    assert block - offload == ROWS * 2 * inputs
    largest = max(
        _saved(configs["none"].model, data, layer, 2)
        for layer in model_size(configs["none"]).layers
        if "blocks" in layer.name
    )
    assert offload >= ROWS * largest and block < none / 3
