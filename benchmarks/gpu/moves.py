"""A checkpoint that a CPU has saved is loaded on the GPU and saved, and the other way round: bit for bit the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.context import ROOT, Context
from megamoe.checkpoint import newest_checkpoint
from megamoe.checkpoint.manifest import read_manifest
from megamoe.checkpoint.pieces import PieceLoadPlanner, Slot
from megamoe.checkpoint.reading import read_pieces

STEPS = 3


def measure(context: Context) -> None:
    """Record how many tensors are equal after each move of configs/demo.yaml with AdamW."""
    saved = _train(context, "on-cpu", on_cpu=True)
    moved = _train(context, "on-device", resume=saved)
    context.record("CPU to device", _compare(saved, moved))
    back = _train(context, "back-on-cpu", resume=moved, on_cpu=True)
    context.record("device to CPU", _compare(moved, back))
    context.record("holds", all(context.figures[way]["holds"] for way in ("CPU to device", "device to CPU")))


def _train(context: Context, name: str, resume: Path | None = None, on_cpu: bool = False) -> Path:
    """Train three steps; going on from another run's third step only loads and saves. Returns the checkpoint."""
    run = context.scratch / name
    command = [
        sys.executable, "-m", "megamoe", "train", str(ROOT / "configs/demo.yaml"), "--nproc", "1", f"run.dir={run}",
        "--resume", str(resume or "none"), f"data.train={context.data}/train", "parallel.pipeline=1", "parallel.expert=1",
        f"data.tokenizer={context.data}/tokenizer.model", "model.decoder.vocab_size=512", f"train.steps={STEPS}",
        "metrics.tensorboard=false", "model.attention=sdpa",
    ]  # fmt: skip
    environment = context.environment(**({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}))
    done = subprocess.run(command, cwd=context.scratch, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


def _compare(one: Path, other: Path) -> dict[str, object]:
    first, second = _read(one), _read(other)
    different = [name for name in first if name not in second or not torch.equal(first[name], second[name])]
    same_names = first.keys() == second.keys()
    return {"tensors": len(first), "different": different[:5], "holds": same_names and not different and bool(first)}


def _read(folder: Path) -> dict[str, Tensor]:
    """All weights and moments of a checkpoint, as integers: NaN is equal to itself then, and 0 is not to -0."""
    stored = read_manifest(folder).tensors
    tensors = {name: torch.empty(each.size) for name, each in stored.items() if not name.startswith("rng/")}
    slots = [Slot(name, tensor.numel(), 0, tensor) for name, tensor in tensors.items()]
    read_pieces(folder, PieceLoadPlanner(slots), distributed=False)
    return {name: tensor.view(torch.int32) for name, tensor in tensors.items()}
