"""Speed and memory of configs/1b.yaml by micro-batch and recomputation, data in memory, the router's own choices."""

from __future__ import annotations

import gc

import torch

from benchmarks.gpu.batches import micro_batches
from benchmarks.gpu.context import Context
from benchmarks.gpu.model_1b import MICRO_BATCHES, build, config_1b, set_recompute, timed_steps
from megamoe.parallel.layout import plan_layout
from megamoe.parallel.memory import predict_memory

CASES = [(4, "none"), (8, "none"), (16, "none"), (16, "block"), (16, "offload"), (32, "none"), (32, "block"), (64, "block")]
MFU, MEMORY = 0.40, 0.10  # the goals


def measure(context: Context) -> None:
    """Record each case; one that is predicted not to fit is not tried."""
    from megamoe.parallel.deepspeed.process_group import joined_world

    room = 0.95 * torch.cuda.get_device_properties(0).total_memory if context.cuda else float("inf")
    best, memory = 0.0, []
    with joined_world() as device:
        engine = build(config_1b(context, 4), device)
        for rows, recompute in [(1, "none"), (1, "block"), (2, "offload")] if context.tiny else CASES:
            name = f"micro-batch {rows}, recompute {recompute}"
            config = config_1b(context, rows, f"parallel.recompute={recompute}")
            predicted = predict_memory(config, plan_layout(config, 1), 0).total
            if predicted > room:
                context.record(name, {"not tried": "the prediction is more than the GPU has", "predicted_bytes": predicted})
                continue
            set_recompute(engine, recompute)
            batches = micro_batches(config, MICRO_BATCHES, rows, seed=rows)
            try:
                figures = timed_steps(context, engine, config, batches)
            except torch.OutOfMemoryError as error:
                context.record(name, {"out of memory": str(error)[:200], "predicted_bytes": predicted})
                break  # the engine stands between two micro-batches
            context.record(name, figures)
            best = max(best, figures["mfu"] or 0.0)
            if context.cuda:
                memory.append(figures["peak_over_predicted"])
            del batches
            gc.collect()
            if context.cuda:
                torch.cuda.empty_cache()
    if context.cuda:
        context.record("goals", {f"MFU {MFU:.0%}": best >= MFU, "memory": all(abs(m - 1) <= MEMORY for m in memory)})
