"""The same run in plain PyTorch, one process, without DeepSpeed: what every layout has to agree with.

It reads the same shards in the same order, takes one sequence at a time, and calls torch.optim and clip_grad_norm_.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megamoe.config import Config
from megamoe.data.loader.step_loader import StepLoader
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.from_config import open_data_set
from megamoe.model.loss import CaptionLoss
from megamoe.model.size import model_size
from megamoe.model.vlm import build_model
from megamoe.train.schedule import learning_rate


@dataclass(frozen=True)
class Reference:
    """Losses and gradient norms of each step, and (step, slot, id) of each sample, as :func:`tests.training.audit`."""

    rows: list[dict[str, float]]
    samples: list[tuple[int, int, str]]


def reference_run(config: Config) -> Reference:
    """Train as ``config`` says; paths are relative to the current folder."""
    assert config.data.tokenizer is not None
    tokenizer = Tokenizer(config.data.tokenizer)
    loader = StepLoader(
        config.data,
        vision=config.model.vision,
        tokenizer=tokenizer,
        dataset=open_data_set(config.data, Path("reference-index")),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=1,
        dp_rank=0,
        dp_size=1,
    )
    model = build_model(config, tokenizer.image_id)
    optimizer = _optimizer(config, model)
    loss = CaptionLoss(config.model.moe, model_size(config).sparse_blocks)
    sequences = config.train.global_batch
    rows, samples = [], []
    for step in range(1, config.train.steps + 1):
        batch = next(loader)
        samples += [(step, slot, name) for slot, name in batch.samples]
        loss.targets_per_micro_batch = batch.targets / sequences
        for pixels, text in batch.micro_batches:
            (loss(model(pixels, text)) / sequences).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, config.train.steps)
        optimizer.step()
        optimizer.zero_grad()
        sums = loss.take()
        assert sums is not None
        parts = dict(zip(loss.parts, (sums / sequences).tolist(), strict=True))
        rows.append({"step": step, **parts, "grad_norm": norm.item()})
    loader.close()
    return Reference(rows, samples)


def _optimizer(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": config.optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.optim.name == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=config.optim.momentum)
    return torch.optim.AdamW(groups, lr=1.0, betas=config.optim.betas, eps=config.optim.eps)
