"""Measure the machine's limits: matrix products, copies, launches of kernels, the disk."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess

import torch

from benchmarks.gpu.context import Context

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s that the vendor states (SXM)."""


def peak_flops(name: str) -> float | None:
    """The stated peak of a GPU, by its name."""
    return next((flops for key, flops in PEAK.items() if key in name), None)


def measure(context: Context) -> None:
    """Record versions, and rates in FLOP/s and bytes/s."""
    packages = ("torch", "triton", "deepspeed", "numpy")
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    context.record("versions", {"python": platform.python_version(), **versions, "cuda": torch.version.cuda})
    context.record("cpus", len(os.sched_getaffinity(0)))
    if context.cuda:
        properties = torch.cuda.get_device_properties(0)
        context.record("gpu", properties.name)
        context.record("gpu_bytes", properties.total_memory)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        if shutil.which(query[0]):
            context.record("driver", subprocess.run(query, capture_output=True, text=True).stdout.strip())
        context.record("peak_flops", peak_flops(properties.name))
    side = 64 if context.tiny else 8192
    context.record("gemm_bf16", _product(context, side, side, side, torch.bfloat16))
    # Products of configs/1b.yaml with 32 sequences of 2,048 tokens: attention, experts of the decoder, the head.
    for name, rows, inner, outer in (
        ("attention", 65536, 1024, 1024),
        ("expert", 8192, 1024, 1792),
        ("head", 1920, 1024, 32000),
    ):
        shape = (64, 64, 64) if context.tiny else (rows, inner, outer)
        context.record(f"gemm_bf16_{name}", _product(context, *shape, torch.bfloat16))
    torch.set_float32_matmul_precision("highest")
    context.record("gemm_fp32", _product(context, *((64,) * 3 if context.tiny else (4096,) * 3), torch.float32))
    size = (1 << 20) if context.tiny else (1 << 30)
    there = torch.empty(size, dtype=torch.uint8, device=context.device)
    onto = torch.empty_like(there)
    context.record("copy_on_device", 2 * size / context.seconds(lambda: onto.copy_(there)))
    host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=context.cuda)
    part = there[: size // 4]
    context.record("copy_to_device", size / 4 / context.seconds(lambda: part.copy_(host, non_blocking=True)))
    context.record("copy_to_host", size / 4 / context.seconds(lambda: host.copy_(part, non_blocking=True)))
    one = torch.zeros(1, device=context.device)

    def launches() -> None:
        for _ in range(1000):
            one.add_(1)

    context.record("launch_seconds", context.seconds(launches, repeats=3) / 1000)
    context.record("write_to_disk", _disk(context, size))


def _product(context: Context, rows: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    a = torch.randn(rows, inner, device=context.device, dtype=dtype)
    b = torch.randn(outer, inner, device=context.device, dtype=dtype)
    return 2.0 * rows * inner * outer / context.seconds(lambda: a @ b.t())


def _disk(context: Context, size: int) -> float:
    block = os.urandom(min(size, 64 << 20))
    path = context.scratch / "block"

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(size // len(block)):
                file.write(block)
            os.fsync(file.fileno())

    return size / context.seconds(write, repeats=1, warm_up=0)
