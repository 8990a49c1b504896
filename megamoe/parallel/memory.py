"""Predict the memory of a rank from the config, and measure it while the rank trains."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamoe.config import Config, DataConfig, ModelConfig
from megamoe.model.size import LayerSize, model_size
from megamoe.parallel.layout import Layout, stage_layers


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank. ``snapshot``, the copy from which ``checkpoint.async`` writes, is always in host memory."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    snapshot: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device that computes; the process itself (Python, libraries, CUDA context) comes on top."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def on(self, device: torch.device) -> int:
        """Return the bytes on ``device``; a CPU holds the snapshot in the same memory."""
        return self.total + (0 if device.type == "cuda" else self.snapshot)


def predict_memory(config: Config, layout: Layout, stage: int) -> MemoryEstimate:
    """Predict what a rank of ``stage`` holds at the peak of a step.

    ZeRO shards dense parameters over the data-parallel ranks and expert parameters over the ranks that hold the same
    experts. Activations count what backward keeps of each layer, for all micro-batches in flight (1F1B). The sum depends
    on the sections model, data, train, optim, parallel and checkpoint, hence the whole config.
    """
    layers = stage_layers(model_size(config), layout, stage)
    dense = sum(layer.dense for layer in layers)
    expert = sum(layer.expert for layer in layers) // layout.expert
    held = dense + expert
    owned = dense / layout.data + expert / (layout.data // layout.expert)
    bf16 = config.train.precision == "bf16"
    width = 2 if bf16 else 4
    weights = width * (owned if layout.zero == 3 else held)
    gradients = width * (held if layout.zero == 1 else owned)
    if bf16:
        gradients += 4 * (held if layout.zero == 1 else owned)  # sums of micro-batches in fp32
    moments = 8 if config.optim.name == "adamw" else (4 if config.optim.momentum else 0)
    optimizer = (4 + moments) * owned
    snapshot = optimizer if config.checkpoint.in_background else 0
    if not bf16:
        optimizer += 4 * owned  # the fp32 engine copies its shard of the gradient before the update
    in_flight = min(layout.pipeline - stage, layout.accumulation)
    model, data, recompute = config.model, config.data, config.parallel.recompute
    activations = in_flight * sum(_kept(model, data, recompute, layer, width) for layer in layers)
    activations += _recomputed(model, data, recompute, layers, width)
    activations *= config.train.micro_batch
    return MemoryEstimate(int(weights), int(gradients), int(optimizer), int(activations), int(snapshot))


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of this process: on CUDA what the allocator gave out, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _kept(model: ModelConfig, data: DataConfig, recompute: str, layer: LayerSize, width: int) -> float:
    """Return the bytes that one sequence leaves in a layer until its backward; ``width``: bytes of an activation."""
    if "blocks" in layer.name and recompute != "none":
        tower = model.vision if layer.name.startswith("vision.") else model.decoder
        return 0 if recompute == "offload" else _tokens(model, data, layer) * tower.width * width
    return _saved(model, data, layer, width)


def _recomputed(model: ModelConfig, data: DataConfig, recompute: str, layers: Sequence[LayerSize], width: int) -> float:
    """Return the bytes per sequence that a block holds during its backward if that repeats the forward pass."""
    if recompute == "none":
        return 0
    return max((_saved(model, data, layer, width) for layer in layers if "blocks" in layer.name), default=0)


def _saved(model: ModelConfig, data: DataConfig, layer: LayerSize, width: int) -> float:
    """Return the bytes of one sequence that the operations of a layer save for backward, each tensor once.

    A test counts them operation by operation, except in attention, whose kernels keep queries, keys, values and results.
    """
    vision, decoder, moe = model.vision, model.decoder, model.moe
    tokens = _tokens(model, data, layer)
    if layer.name == "vision.embed":
        return tokens * 3 * vision.patch_size**2 * width
    if layer.name == "merge":  # norm in and out, both products, GELU
        return tokens * (2 * vision.width + 3 * decoder.width) * width
    if layer.name == "head":
        scores = decoder.vocab_size * (width + 8)  # scores, and their fp32 copy and softmax
        return tokens * (scores + (2 * width + 4) * decoder.width)
    if layer.name.startswith("vision."):
        tower_width, expert_width = vision.width, vision.expert_width
        per_token = 6 * width * tower_width  # norm in and out, q, k, v, result
        per_token += width * tower_width  # second norm
        dense = width * (tower_width + 2 * vision.mlp_width)
    else:
        tower_width, expert_width = decoder.width, decoder.expert_width
        queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
        norm = 4 + width  # the input in fp32, and normalised
        per_token = norm * (2 * tower_width + queries + keys)
        per_token += width * (tower_width + 3 * queries + 2 * keys)  # q, k, v, result, and the result transposed
        dense = width * (tower_width + 4 * decoder.mlp_width)
    if layer.sparse:
        choice = 2 * tower_width + 4 * expert_width  # rows in and out, gate and up, SiLU of gate, product
        per_token += 4 * (tower_width + 3 * moe.experts) + width * moe.top_k * choice  # the router works in fp32
    else:
        per_token += dense
    return tokens * per_token


def _tokens(model: ModelConfig, data: DataConfig, layer: LayerSize) -> int:
    """Return the tokens of a packed sequence that a layer works on."""
    pictures = model.vision.patches * data.images_per_sequence
    if layer.name == "head":
        return data.sequence_length - pictures  # only text is scored
    return pictures if layer.name == "merge" or layer.name.startswith("vision.") else data.sequence_length
