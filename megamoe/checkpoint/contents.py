"""What a checkpoint of a config has to hold: every weight and optimizer moment, by name and size. Nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from megamoe.config import Config, OptimConfig
from megamoe.model.parameter import ExpertShard, info_of
from megamoe.model.vlm import build_layer, layer_specs, named_parameters

_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


@dataclass(frozen=True)
class Expected:
    """A global tensor: elements, and how many experts are stacked in it (0: none)."""

    size: int
    experts: int


def moments_of(optim: OptimConfig) -> tuple[str, ...]:
    """Names of the moments that the optimizer keeps for each weight; without momentum SGD keeps none."""
    return _MOMENTS[optim.name] if optim.name == "adamw" or optim.momentum > 0 else ()


def expected_weights(config: Config) -> dict[str, Expected]:
    """Every weight of the model by its global name."""
    expected = {}
    with torch.device("meta"):
        for spec in layer_specs(config.model, image_token=0):
            for name, parameter in named_parameters(spec.name, build_layer(spec, ExpertShard(), seed=None)):
                expected[name] = Expected(prod(parameter.shape), info_of(parameter).global_experts)
    return expected


def expected_tensors(config: Config) -> dict[str, Expected]:
    """Every fp32 master weight (``weight/NAME``) and optimizer moment (``MOMENT/NAME``)."""
    weights = expected_weights(config)
    return {f"{kind}/{name}": size for kind in ("weight", *moments_of(config.optim)) for name, size in weights.items()}
