"""Running real training in tests: data that is drawn once, the command as a user gives it, and what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher.workers.processes import local_environments
from tests.warm import run_ranks

ROOT = Path(__file__).parent.parent
LOSSES = ("loss", "lm_loss", "aux_loss", "z_loss", "grad_norm")


def megamoe(*arguments: str, folder: Path, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the ``megamoe`` command in ``folder``; a non-zero status fails the test and shows what it printed."""
    command = [sys.executable, "-m", "megamoe", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, errors="backslashreplace", timeout=timeout
    )
    if check:
        assert done.returncode == 0, f"{' '.join(arguments)}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def make_data(folder: Path, *, level: int = 3, samples: int = 300, image_size: int = 32) -> None:
    """Shards of real JPEGs in ``folder``/shards and a tokenizer beside them."""
    megamoe(
        "data", "synth", "shards", "--samples", str(samples), "--seed", "1", "--level", str(level),
        "--image-size", str(image_size), "--shard-size", "70", "--validation", "40", folder=folder,
    )  # fmt: skip
    megamoe("data", "tokenizer", "shards/train", "tokenizer", "--vocab-size", "400", folder=folder)


def small_config(**sections: dict[str, Any]) -> dict[str, Any]:
    """A sparse model of both towers that trains in milliseconds per step; ``sections`` are merged into it."""
    config: dict[str, Any] = {
        "model": {
            "init_std": 0.1,
            "vision": {
                "image_size": 32,
                "patch_size": 8,
                "width": 32,
                "depth": 4,
                "heads": 2,
                "mlp_width": 64,
                "sparse_every": 2,
                "expert_width": 24,
            },
            "decoder": {
                "vocab_size": 400,
                "width": 48,
                "depth": 4,
                "heads": 4,
                "kv_heads": 2,
                "head_dim": 16,
                "mlp_width": 64,
                "sparse_every": 1,
                "expert_width": 32,
            },
            "moe": {"experts": 8, "top_k": 2, "aux_loss": 0.1, "z_loss": 0.01},
        },
        "data": {
            "train": "shards/train",
            "validation": "shards/validation",
            "tokenizer": "tokenizer.model",
            "sequence_length": 96,
            "images_per_sequence": 3,
            "workers": 0,
            "shuffle_shards": 2,
            "audit": True,
        },
        "train": {"steps": 10, "global_batch": 8, "micro_batch": 1, "precision": "fp32"},
        # Clipping that bites at each step: a wrong scale of gradients shows at once under SGD.
        "optim": {"name": "sgd", "lr": 0.5, "clip": 0.05, "warmup": 3, "weight_decay": 0.0},
        "checkpoint": {"every": 5},
        "metrics": {"tensorboard": False},
        "launch": {"max_restarts": 0},
    }
    for section, values in sections.items():
        _merge(config.setdefault(section, {}), values)
    return config


def write_config(folder: Path, config: dict[str, Any], name: str = "config.yaml") -> Path:
    """Write ``config`` as YAML into ``folder``."""
    path = folder / name
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def train(
    folder: Path,
    name: str,
    nproc: int,
    overrides: Sequence[str] = (),
    resume: str = "none",
    config: str = "config.yaml",
) -> list[dict[str, Any]]:
    """Train run ``name`` on ``nproc`` ranks and return its metrics."""
    ended = _ranks(folder, nproc, ["megamoe", "train", config, "--resume", resume, f"run.name={name}", *overrides], 300)
    assert not any(status for status, _ in ended), "\n".join(f"status {status}\n{said}" for status, said in ended)
    return metrics(folder / "runs" / name)


def with_fault(
    folder: Path, script: str, fault: str, nproc: int, *arguments: str, timeout: float = 120
) -> list[tuple[int, str]]:
    """Run ``tests/faults/SCRIPT FAULT train ARGUMENTS`` as torchrun would; (status, output) of each rank."""
    return _ranks(folder, nproc, [str(ROOT / "tests/faults" / script), fault, "train", *arguments], timeout)


def _ranks(folder: Path, nproc: int, argv: list[str], timeout: float) -> list[tuple[int, str]]:
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return run_ranks(argv, [base | env for base in local_environments(nproc).values()], folder, timeout)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def audit(run: Path) -> list[tuple[int, int, str]]:
    """(step, slot, id) of all samples trained on, over all ranks, sorted; a slot's samples stay in their order."""
    rows = []
    for path in sorted((run / "audit").glob("rank-*.jsonl")):
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(((row["step"], row["slot"], row["id"]) for row in rows), key=lambda row: row[:2])


def largest_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[float, str]:
    """Largest relative difference of any loss part or gradient norm at any step, and where."""
    assert [row["step"] for row in one] == [row["step"] for row in other]
    worst = (0.0, "equal")
    for a, b in zip(one, other, strict=True):
        for key in LOSSES:
            difference = abs(a[key] - b[key]) / max(abs(a[key]), 1e-30)
            if not difference <= worst[0]:
                worst = (difference, f"{key} at step {a['step']}: {a[key]} and {b[key]}")
    return worst


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
