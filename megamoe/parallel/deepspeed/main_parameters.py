"""Find the pieces of main parameters (fp32) and moments that this rank owns, and make loaded ones take effect.

This needs no communication: ZeRO shards flat buffers, and each rank knows its range of each parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamoe.model.parameter import info_of
from megamoe.parallel.deepspeed.engine import TrainEngine


@dataclass(frozen=True)
class Piece:
    """A range of a global tensor, flattened.

    Attributes:
        name: Global name, for example ``exp_avg/decoder.blocks.3.attention.q.weight``.
        shape: Shape of the global tensor.
        start: First element, in the flattened global tensor.
        data: fp32 view (n,) into the optimizer's memory: writing to it changes the run.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor


def owned_pieces(engine: TrainEngine, moments: tuple[str, ...]) -> list[Piece]:
    """Return all pieces of main parameters (``weight/...``) and of the named moments that this rank owns."""
    optimizer = engine.deepspeed.optimizer
    pieces = []
    for name, parameter in engine.parameters.items():
        located = _zero3_range(optimizer, parameter) if engine.layout.zero == 3 else _zero12_range(optimizer, parameter)
        if located is None:
            continue  # no element of this parameter is in this rank's shard
        start, flat, flat_start, count = located
        shape, shift = _global_place(parameter)
        state = engine.deepspeed.basic_optimizer.state.get(flat, {})
        sources = {"weight": flat.detach(), **{moment: state[moment] for moment in moments}}
        pieces += [
            Piece(f"{kind}/{name}", shape, shift + start, source[flat_start : flat_start + count])
            for kind, source in sources.items()
        ]
    return pieces


def create_moments(engine: TrainEngine, moments: tuple[str, ...], updates: int) -> None:
    """Create the optimizer state that exists after ``updates`` updates, filled with zeros for a load to overwrite."""
    for flat in flat_partitions(engine.deepspeed.optimizer):
        state: dict[str, Tensor] = {moment: torch.zeros_like(flat.detach()) for moment in moments}
        if "exp_avg" in state:  # AdamW counts its updates for bias correction
            state["step"] = torch.tensor(float(updates), device=flat.device)
        engine.deepspeed.basic_optimizer.state[flat] = state


def refresh_weights(engine: TrainEngine) -> None:
    """Copy the main parameters into the weights that the forward pass uses."""
    optimizer = engine.deepspeed.optimizer
    if engine.layout.zero == 3:
        optimizer._partition_all_parameters()
        for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if optimizer.persistent_parameters:  # small ones that stay gathered
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    else:
        optimizer.update_lp_params()


def _global_place(parameter: nn.Parameter) -> tuple[tuple[int, ...], int]:
    """Return the shape of the global tensor and where this rank's part starts in it, flattened."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    info = info_of(parameter)
    if not info.is_expert:
        return shape, 0
    each = 1
    for size in shape[1:]:
        each *= size
    return (info.global_experts, *shape[1:]), info.first_expert * each


def _zero12_range(optimizer: Any, parameter: nn.Parameter) -> tuple[int, Tensor, int, int] | None:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    inside, outside = mapping.lp_fragment_address, mapping.hp_fragment_address
    if not inside.numel:
        return None
    flat = flat_partitions(optimizer)[mapping.param_group_index]
    return inside.start, flat, outside.start, inside.numel


def _zero3_range(optimizer: Any, parameter: Any) -> tuple[int, Tensor, int, int] | None:
    sub_group, flat_start, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = dist.get_rank(parameter.ds_process_group) * padded
    count = min(padded, parameter.ds_numel - start)
    if count <= 0:
        return None
    return start, optimizer.fp32_partitioned_groups_flat[sub_group], flat_start, count


def flat_partitions(optimizer: Any) -> list[Tensor]:
    """Return the flat fp32 buffers of main parameters that this rank owns, whatever the ZeRO stage."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            partitions: list[Tensor] = getattr(optimizer, name)
            return partitions
    raise AssertionError(f"unknown DeepSpeed optimizer {type(optimizer).__name__}")
