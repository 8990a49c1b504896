"""Parameters that carry which piece of the global parameter they are, and their initial distribution.

Initial weights depend only on (seed, global name, global expert), so every layout builds the same model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ParameterInfo:
    """What a parameter is, attached to it as ``parameter.info``.

    Attributes:
        std: Standard deviation of the initial normal distribution; 0 fills with ``fill``.
        fill: Initial value where ``std`` is 0.
        global_experts: Experts of the whole block if dimension 0 counts experts, else 0.
        first_expert: Global index of the first expert held here.
    """

    std: float
    fill: float = 0.0
    global_experts: int = 0
    first_expert: int = 0

    @property
    def is_expert(self) -> bool:
        """Whether each rank of an expert-parallel group holds a different part of it."""
        return self.global_experts > 0


@dataclass(frozen=True)
class ExpertShard:
    """Which experts of every sparse block this rank holds: part ``rank`` of ``size`` equal, contiguous parts."""

    rank: int = 0
    size: int = 1


def matrix(*shape: int, std: float) -> nn.Parameter:
    """Make a weight that starts from a normal distribution."""
    return _parameter(shape, ParameterInfo(std=std))


def vector(size: int, fill: float) -> nn.Parameter:
    """Make a bias or norm scale that starts constant."""
    return _parameter((size,), ParameterInfo(std=0.0, fill=fill))


def expert_matrix(experts: int, shard: ExpertShard, *shape: int, std: float) -> nn.Parameter:
    """Make the stacked weights of the experts held here: (experts / shard.size, *shape)."""
    held = experts // shard.size
    return _parameter((held, *shape), ParameterInfo(std, global_experts=experts, first_expert=held * shard.rank))


def info_of(parameter: nn.Parameter) -> ParameterInfo:
    """Return the :class:`ParameterInfo` of a parameter made in this module."""
    info: ParameterInfo = parameter.info  # type: ignore[attr-defined]
    return info


@torch.no_grad()
def initialize(name: str, parameter: nn.Parameter, seed: int) -> None:
    """Fill a parameter with its initial values. ``name`` is its global name."""
    info = info_of(parameter)
    if info.std == 0:
        parameter.fill_(info.fill)
    elif info.is_expert:
        for local, expert in enumerate(parameter):
            _fill_normal(expert, info.std, seed, f"{name}#{info.first_expert + local}")
    else:
        _fill_normal(parameter, info.std, seed, name)


def _fill_normal(tensor: torch.Tensor, std: float, seed: int, name: str) -> None:
    # Draw on the CPU so that CPU and CUDA runs of one seed start equal.
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    tensor.copy_(torch.empty(tensor.shape).normal_(0.0, std, generator=generator))


def _parameter(shape: tuple[int, ...], info: ParameterInfo) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape))
    parameter.info = info  # type: ignore[attr-defined]
    return parameter
