"""Memory of a rank, predicted from the config and measured while it trains."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch

from megamoe.config import Config
from megamoe.config.size import LayerSize, model_size
from megamoe.parallel.layout import Layout, stage_layers


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank. ``snapshot``, the copy that ``checkpoint.async`` writes from, is always in host memory."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    snapshot: int = 0

    @property
    def total(self) -> int:
        """What a rank holds where it computes; the process itself (Python, libraries, CUDA context) comes on top."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def on(self, device: torch.device) -> int:
        """What a rank holds on ``device``: on a CPU the snapshot is in the same memory."""
        return self.total + (0 if device.type == "cuda" else self.snapshot)


def predict_memory(config: Config, layout: Layout, stage: int) -> MemoryEstimate:
    """What a rank of ``stage`` holds at the peak of a step.

    Dense parameters are sharded by ZeRO over the data-parallel ranks, expert parameters over the ranks that hold the
    same experts. Activations count what backward keeps of each layer, for the micro-batches in flight (1F1B).
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
    activations = in_flight * sum(_kept(config, layer, width) for layer in layers) * config.train.micro_batch
    return MemoryEstimate(int(weights), int(gradients), int(optimizer), int(activations), int(snapshot))


def peak_memory(device: torch.device) -> int:
    """Bytes this process has used at most: on CUDA what the allocator gave out, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _kept(config: Config, layer: LayerSize, width: int) -> float:
    """Bytes that one sequence leaves in a layer for backward, by counting the saved inputs of its operations."""
    vision, decoder, moe, data = config.model.vision, config.model.decoder, config.model.moe, config.data
    tower = vision if layer.name.startswith("vision.") else decoder
    picture_tokens = vision.patches * data.images_per_sequence
    tokens = picture_tokens if tower is vision else data.sequence_length
    if layer.name == "head":
        text = data.sequence_length - picture_tokens
        return text * decoder.vocab_size * (width + 8)  # scores, and their fp32 copy and softmax
    if "blocks" not in layer.name:
        return tokens * tower.width * width * 3
    if config.parallel.recompute != "none":
        return 0 if config.parallel.recompute == "offload" else tokens * tower.width * width
    attention = 3 * tower.width + 2 * (vision.width * 2 if tower is vision else decoder.heads * decoder.head_dim * 2)
    if layer.sparse:
        per_choice = 3 * tower.width + 4 * tower.expert_width
        mlp = 2 * tower.width + moe.top_k * per_choice + moe.experts * 6 * 4 / width
    else:
        mlp = 2 * tower.width + (2 if tower is vision else 4) * tower.mlp_width
    return tokens * (attention + mlp) * width
