"""One step of configs/1b.yaml: the dearest kernels, waits of the host, gaps, and the time of each part of the model."""

from __future__ import annotations

import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.batches import micro_batches, targets
from benchmarks.gpu.context import Context
from benchmarks.gpu.model_1b import MICRO_BATCHES, build, config_1b
from megamoe.model.experts import Experts
from megamoe.model.moe import Router, SparseMLP
from megamoe.parallel.deepspeed.engine import TrainEngine

ROWS = 16
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
READS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")


def measure(context: Context) -> None:
    """Record everything of a step of two micro-batches, after three to warm up."""
    from megamoe.parallel.deepspeed.process_group import joined_world

    rows = 1 if context.tiny else ROWS
    config = config_1b(context, rows)
    batches = micro_batches(config, MICRO_BATCHES, rows, seed=1)
    with joined_world() as device:
        engine = build(config, device)

        def step() -> None:
            engine.step(batches, targets(batches), 1e-4)

        for _ in range(3):
            step()
        context.record("step_seconds", context.seconds(step, repeats=5, warm_up=0))
        if context.cuda:
            context.record("waits of the host, by place", _places(step))
        context.record("seconds of each part", _parts(context, engine, step))
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.cuda else [])]
        with profile(activities=activities) as profiler:
            step()
            context.synchronize()
        _summarise(context, profiler)


def _places(step: Callable[[], None]) -> dict[str, int]:
    """Lines of code at which the host waits for the device, and how often in a step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [each for each in caught if "synchroniz" in str(each.message)]
    places = Counter(f"{'/'.join(each.filename.split('/')[-3:])}:{each.lineno}" for each in found)
    return dict(places.most_common(30))


def _summarise(context: Context, profiler: Any) -> None:
    averages = profiler.key_averages()
    time_of = (lambda each: each.self_device_time_total) if context.cuda else (lambda each: each.self_cpu_time_total)
    dearest = sorted(averages, key=time_of, reverse=True)
    if context.cuda:
        dearest = [each for each in dearest if each.device_type.name == "CUDA"]
    total = sum(map(time_of, dearest)) or 1.0
    kernels = [
        {"kernel": each.key[:120], "calls": each.count, "seconds": time_of(each) / 1e6, "share": time_of(each) / total}
        for each in dearest[:20]
    ]
    context.record("dearest kernels", kernels)
    counts = {each.key: each.count for each in averages}
    context.record("waits of the host", {name: counts.get(name, 0) for name in WAITS + READS})
    context.record("launches", counts.get("cudaLaunchKernel", 0) + counts.get("cudaLaunchKernelExC", 0))
    if context.cuda:
        context.record("gaps", _gaps(profiler))


def _gaps(profiler: Any) -> dict[str, float]:
    """Measure how long no kernel runs between the first and the last one, in seconds."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA" and event.time_range.end > event.time_range.start
    )
    if not spans:
        return {}
    idle, long_ones, longest, end = 0.0, 0, 0.0, spans[0][1]
    for start, stop in spans[1:]:
        if start > end:
            idle += start - end
            long_ones += start - end > 20
            longest = max(longest, start - end)
        end = max(end, stop)
    whole = end - spans[0][0]
    return {
        "whole_seconds": whole / 1e6, "idle_seconds": idle / 1e6, "idle_share": idle / whole, "over 20 us": long_ones,
        "longest_seconds": longest / 1e6,
    }  # fmt: skip


def _parts(context: Context, engine: TrainEngine, step: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Seconds in forward and backward of each part, measured on the device's own clock between its hooks."""
    marks: dict[tuple[str, str], list[tuple[Any, Any]]] = defaultdict(list)
    begun: dict[tuple[int, str], Any] = {}
    handles = []

    def now() -> Any:
        if not context.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(module: nn.Module, way: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            begun[id(module), way] = now()

        return hook

    def end(module: nn.Module, name: str, way: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if (started := begun.pop((id(module), way), None)) is not None:
                marks[name, way].append((started, now()))

        return hook

    def watch(module: nn.Module, name: str) -> None:
        handles.append(module.register_forward_pre_hook(begin(module, "forward")))
        handles.append(module.register_forward_hook(end(module, name, "forward")))
        handles.append(module.register_full_backward_pre_hook(begin(module, "backward")))
        handles.append(module.register_full_backward_hook(end(module, name, "backward")))

    # A layer's own backward begins when the gradient of its output is there, and ends with that of its input.
    crossed: list[tuple[int, Any]] = []

    def boundary(number: int) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
            outputs[0].register_hook(lambda _gradient: crossed.append((number, now())))

        return hook

    names = list(engine._layers)
    for number, (name, layer) in enumerate(engine._layers.items()):
        tower = name.split(".")[0]
        handles.append(layer.register_forward_pre_hook(begin(layer, "forward")))
        handles.append(layer.register_forward_hook(end(layer, _group(name), "forward")))
        handles.append(layer.register_forward_hook(boundary(number)))
        for part in layer.modules():
            if type(part).__name__ in ("DecoderAttention", "VisionAttention"):
                watch(part, f"{tower}: attention")
            elif isinstance(part, SparseMLP):
                watch(part, f"{tower}: sparse MLP")
            elif isinstance(part, Router):
                watch(part, f"{tower}: router")
            elif isinstance(part, Experts):
                watch(part, f"{tower}: experts")
    whole = context.clock(step)
    for handle in handles:
        handle.remove()
    for (number, started), (following, ended) in pairwise(crossed):
        if following == number - 1:
            marks[_group(names[number]), "backward"].append((started, ended))
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for (name, way), spans in marks.items():
        found[name][way] = sum(a.elapsed_time(b) / 1e3 if context.cuda else b - a for a, b in spans)
    layers = sum(sum(ways.values()) for name, ways in found.items() if ":" not in name)
    found["optimizer and all else"] = {"step": whole - layers}
    return dict(found)


def _group(layer: str) -> str:
    return f"{layer.split('.')[0]} blocks" if ".blocks." in layer else layer
