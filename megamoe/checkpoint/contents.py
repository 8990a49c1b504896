"""List what a checkpoint has to hold: every weight and optimizer moment by name and size. Allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from megamoe.config import ModelConfig, OptimConfig
from megamoe.model.parameter import ExpertShard, info_of
from megamoe.model.vlm import build_layer, layer_specs, named_parameters

_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


@dataclass(frozen=True)
class Expected:
    """A global tensor: its elements, and the number of experts stacked in it (0: none)."""

    size: int
    experts: int


def moments_of(optim: OptimConfig) -> tuple[str, ...]:
    """Return the names of the moments that the optimizer keeps for each weight; SGD without momentum keeps none."""
    return _MOMENTS[optim.name] if optim.name == "adamw" or optim.momentum > 0 else ()


def expected_weights(model: ModelConfig) -> dict[str, Expected]:
    """Return every weight of the model by its global name."""
    expected = {}
    with torch.device("meta"):
        for spec in layer_specs(model, image_token=0):
            for name, parameter in named_parameters(spec.name, build_layer(spec, ExpertShard(), seed=None)):
                expected[name] = Expected(prod(parameter.shape), info_of(parameter).global_experts)
    return expected


def expected_tensors(model: ModelConfig, optim: OptimConfig) -> dict[str, Expected]:
    """Return every main parameter (``weight/NAME``) and optimizer moment (``MOMENT/NAME``), all fp32."""
    weights = expected_weights(model)
    return {f"{kind}/{name}": size for kind in ("weight", *moments_of(optim)) for name, size in weights.items()}
