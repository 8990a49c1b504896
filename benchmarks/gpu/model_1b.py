"""configs/1b.yaml on one device: its config, an engine whose weights are drawn on the device, steps that are timed."""

from __future__ import annotations

import statistics
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.gpu.batches import Words, targets, tokens
from benchmarks.gpu.context import ROOT, Context
from benchmarks.gpu.machine import peak_flops
from megamoe.config import Config, load_config
from megamoe.model.parameter import info_of
from megamoe.model.pipeline_layer import BlockLayer, call_block
from megamoe.model.size import model_size
from megamoe.parallel.deepspeed.engine import MicroBatch, TrainEngine
from megamoe.parallel.layout import plan_layout
from megamoe.parallel.memory import predict_memory
from megamoe.parallel.recompute import apply_recompute

MICRO_BATCHES = 2  # of a step
TINY = (
    "model.vision.image_size=32", "model.vision.patch_size=8", "model.vision.width=32", "model.vision.depth=2",
    "model.vision.heads=2", "model.vision.mlp_width=64", "model.vision.expert_width=32", "model.decoder.vocab_size=512",
    "model.decoder.width=64", "model.decoder.depth=2", "model.decoder.heads=4", "model.decoder.kv_heads=2",
    "model.decoder.head_dim=16", "model.decoder.expert_width=32", "data.sequence_length=160",
    "data.images_per_sequence=4", "train.precision=fp32",
)  # fmt: skip


def config_1b(context: Context, micro_batch: int, *overrides: str) -> Config:
    """One rank, steps of two micro-batches."""
    settings = [
        "parallel.pipeline=1", "parallel.expert=1", f"train.micro_batch={micro_batch}",
        f"train.global_batch={MICRO_BATCHES * micro_batch}", *(TINY if context.tiny else ()), *overrides,
    ]  # fmt: skip
    return load_config(ROOT / "configs/1b.yaml", settings)


def build(config: Config, device: torch.device) -> TrainEngine:
    """The engine, its weights drawn on the device: drawing 1e9 numbers on the CPU would take nine seconds."""

    @torch.no_grad()
    def draw(_name: str, parameter: nn.Parameter, _seed: int) -> None:
        info, data = info_of(parameter), torch.empty(parameter.shape, device=device)
        parameter.data = data.normal_(0, info.std) if info.std else data.fill_(info.fill)

    torch.manual_seed(0)
    with mock.patch("megamoe.model.vlm.initialize", draw):
        return TrainEngine(config, plan_layout(config, 1), Words().image_id, device)


def set_recompute(engine: TrainEngine, mode: str) -> None:
    """Change ``parallel.recompute`` of an engine that is built."""
    module = engine.module
    for layer in [each for each in module.modules() if isinstance(each, BlockLayer)]:
        layer.run = call_block
        vars(layer.block).pop("forward", None)  # what fairscale has put there
    apply_recompute(module, mode)


def timed_steps(
    context: Context, engine: TrainEngine, config: Config, batches: list[MicroBatch], steps: int = 4, warm_up: int = 2
) -> dict[str, Any]:
    """Train, and say how fast. FLOPs count what is no padding; their share is of the GPU's stated peak."""
    step_targets = targets(batches)

    def step() -> None:
        result = engine.step(batches, step_targets, 1e-4)
        assert result.applied, result
        loads.append(max(max(load) for load in result.load.values()))

    loads: list[float] = []
    for _ in range(warm_up):
        step()
    if context.cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = [context.clock(step) for _ in range(steps)]
    middle = statistics.median(seconds)
    sequences = sum(len(text) for _, text in batches)
    filled = tokens(batches) / (sequences * config.data.sequence_length)
    flops = model_size(config).flops_per_sequence * sequences * filled / middle
    peak = peak_flops(torch.cuda.get_device_name()) if context.cuda else None
    predicted = predict_memory(config, engine.layout, 0).total
    figures: dict[str, Any] = {
        "step_seconds": middle,
        "all_step_seconds": seconds,
        "tokens_per_second": tokens(batches) / middle,
        "filled": filled,
        "model_flops_per_second": flops,
        "mfu": flops / peak if peak else None,
        "largest share of an expert": loads[-1],
        "predicted_bytes": predicted,
    }
    if context.cuda:
        used = torch.cuda.max_memory_allocated()
        figures |= {"peak_bytes": used, "reserved_bytes": torch.cuda.max_memory_reserved()}
        figures["peak_over_predicted"] = used / predicted
    return figures
