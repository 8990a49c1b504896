"""What an engine is initialised with: the optimizer with its parameter groups, and DeepSpeed's config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megamoe.config.training import OptimConfig, TrainConfig
from megamoe.model.parameter import info_of
from megamoe.parallel.deepspeed.expert_parallel import group_name
from megamoe.parallel.layout import Layout


def build_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter], layout: Layout) -> torch.optim.Optimizer:
    """Build the optimizer over three parameter groups.

    Matrices decay and vectors do not. Experts form a group of their own, so that ZeRO shards them over their replicas.
    """
    decay, no_decay, experts = [], [], []
    for parameter in parameters:
        if info_of(parameter).is_expert and layout.expert > 1:
            experts.append(parameter)
        elif parameter.ndim > 1:
            decay.append(parameter)
        else:
            no_decay.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "name": "matrices", "weight_decay": config.weight_decay},
        {"params": no_decay, "name": "vectors", "weight_decay": 0.0},
    ]
    if experts:
        name = group_name(layout)
        groups.append({"params": experts, "name": name, "moe": True, "weight_decay": config.weight_decay})
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def deepspeed_config(train: TrainConfig, clip: float, layout: Layout) -> dict[str, Any]:
    """Return DeepSpeed's config for a layout; gradients are clipped to the global norm ``clip``."""
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": clip,
        "bf16": {"enabled": train.precision == "bf16"},
        # Sums over many micro-batches lose bits in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": layout.zero,
            "contiguous_gradients": True,
            "overlap_comm": False,  # its bucket order depends on timing
            "reduce_scatter": True,
        },
        # AdamW and SGD of torch: elementwise updates are the same on a shard.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        # It waits for the device before and after each micro-batch; the trainer times steps itself.
        "timers": {"throughput": {"enabled": False}},
    }
