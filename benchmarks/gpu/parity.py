"""The demo's model on one rank: ten steps of SGD with clipping that bites, beside what a CPU computed.

    python -m benchmarks.gpu.parity          writes expected.json, on a CPU, with plain PyTorch

``expected.json`` belongs to the commit that it lies in: a test computes it anew.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.batches import Words, micro_batches, targets
from benchmarks.gpu.context import ROOT, Context
from megamoe.config import Config, load_config
from megamoe.model.loss import CaptionLoss
from megamoe.model.size import model_size
from megamoe.model.vlm import build_model
from megamoe.parallel.layout import plan_layout

EXPECTED = Path(__file__).with_name("expected.json")
LOSSES = ("loss", "lm_loss", "aux_loss", "z_loss", "grad_norm")
STEPS = 10
FP32 = 1e-4  # relative, at each of ten steps: roundings grow from step to step, a wrong scale is seen in the first
BF16 = (2e-2, 1e-1)  # losses, norm: as tests/parity asks of layouts on a CPU

Rows = list[dict[str, float]]


def demo(*overrides: str) -> Config:
    """configs/demo.yaml with SGD and tight clipping, on one rank unless ``overrides`` say otherwise."""
    settings = [
        "parallel.pipeline=1", "parallel.expert=1", f"train.steps={STEPS}", "optim.name=sgd", "optim.lr=0.5",
        "optim.clip=0.05", "optim.weight_decay=0", "model.attention=sdpa", "model.moe.aux_loss=0.1",
        "model.moe.z_loss=0.01",
    ]  # fmt: skip
    return load_config(ROOT / "configs/demo.yaml", [*settings, *overrides])


def global_batch(config: Config, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches of a step over all ranks, in the order of the loader."""
    rows = config.train.micro_batch
    return micro_batches(config, config.train.global_batch // rows, rows, seed=step, longest=8)


def reference() -> Rows:
    """The run in plain PyTorch, without DeepSpeed, in fp32 on the CPU."""
    config = demo()
    model = build_model(config, Words().image_id)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.optim.lr)
    loss = CaptionLoss(config.model.moe, model_size(config).sparse_blocks)
    rows = []
    for step in range(1, STEPS + 1):
        batches = global_batch(config, step)
        loss.targets_per_micro_batch = targets(batches) / len(batches)
        for batch in batches:
            (loss(model(*batch)) / len(batches)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        sums = loss.take()
        assert sums is not None
        rows.append({**dict(zip(loss.parts, (sums / len(batches)).tolist(), strict=True)), "grad_norm": norm.item()})
    return rows


def train(config: Config, device: torch.device, steps: int = STEPS) -> Rows:
    """The run on the ranks that are there, with our engine. Equal on all ranks."""
    import torch.distributed as dist

    from megamoe.parallel.deepspeed.engine import TrainEngine

    layout = plan_layout(config, dist.get_world_size())
    engine = TrainEngine(config, layout, Words().image_id, device)
    rank = layout.data_rank(dist.get_rank())
    rows = []
    for step in range(1, steps + 1):
        batches = global_batch(config, step)
        result = engine.step(batches[rank :: layout.data], targets(batches), config.optim.lr)
        assert result.applied, result
        rows.append({name: getattr(result, name) for name in LOSSES})
    return rows


def differences(rows: Rows, expected: Rows) -> dict[str, float]:
    """Largest relative difference over the steps of ``rows``, of the losses and of the norm."""

    def largest(names: tuple[str, ...]) -> float:
        return max(
            abs(row[name] - other[name]) / abs(other[name])
            for row, other in zip(rows, expected[: len(rows)], strict=True)
            for name in names
        )

    return {"losses": largest(LOSSES[:-1]), "grad_norm": largest(LOSSES[-1:])}


def measure(context: Context) -> None:
    """Record for each number format and attention kernel how far it is from the CPU, and whether two runs are equal."""
    from megamoe.parallel.deepspeed.process_group import joined_world

    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    cases: dict[str, tuple[str, ...]] = {"fp32, dense mask": (), "fp32 again": ()}
    if context.cuda:  # on a CPU flex attention has no backward
        cases["fp32, flex"] = ("model.attention=flex",)
        cases["bf16, flex"] = ("model.attention=flex", "train.precision=bf16")
        cases["bf16, flex again"] = ("model.attention=flex", "train.precision=bf16")
    cases["bf16, dense mask"] = ("train.precision=bf16",)
    holds, all_rows = True, {}
    with joined_world() as device:
        for name, overrides in cases.items():
            all_rows[name] = train(demo(*overrides), device, 3 if context.tiny else STEPS)
            figures: dict[str, Any] = differences(all_rows[name], expected)
            limits = BF16 if "bf16" in name else (FP32, FP32)
            figures["holds"] = figures["losses"] <= limits[0] and figures["grad_norm"] <= limits[1]
            if name.endswith(" again"):
                first = all_rows["fp32, dense mask" if "fp32" in name else name.removesuffix(" again")]
                figures["bit for bit the first run"] = all_rows[name] == first
            holds = holds and figures["holds"]
            context.record(name, figures)
            gc.collect()
    context.record("holds", holds)


def main() -> None:
    """Write what a CPU computes."""
    torch.set_num_threads(1)
    EXPECTED.write_text(json.dumps(reference(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
