"""Plan how a config fits a number of ranks. Pure arithmetic: runs before any process or group exists."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from megamoe.config import Config
from megamoe.core.errors import UserError
from megamoe.model.layer_names import layer_names
from megamoe.model.size import LayerSize, ModelSize, model_size


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, and the place of each rank.

    Ranks are numbered stage by stage: rank = stage * data + data rank. Neighbours in a stage form an expert-parallel group.

    Attributes:
        pipeline: Pipeline stages.
        data: Data-parallel degree: ranks of a stage.
        expert: Expert-parallel degree: ranks that share a block's experts; divides ``data``.
        zero: ZeRO stage.
        accumulation: Micro-batches per rank and optimizer step.
        config: What the layout was planned for.
    """

    pipeline: int
    data: int
    expert: int
    zero: int
    accumulation: int
    config: Config = field(repr=False, compare=False)

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Stage s holds layers bounds[s] to bounds[s+1] - 1. Computed at the first use, which imports torch."""
        return tuple(_partition(model_size(self.config), self.pipeline, needs_experts=self.expert > 1))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.data

    def stage(self, rank: int) -> int:
        """Return the pipeline stage of a rank."""
        return rank // self.data

    def data_rank(self, rank: int) -> int:
        """Return the place of a rank within its stage."""
        return rank % self.data

    def expert_rank(self, rank: int) -> int:
        """Return which part of the experts a rank holds."""
        return self.data_rank(rank) % self.expert

    def describe(self) -> str:
        """Describe the layout in one line."""
        return (
            f"{self.world_size} ranks = pipeline {self.pipeline} x data {self.data} (expert {self.expert}), "
            f"ZeRO-{self.zero}, {self.accumulation} micro-batches per step"
        )


def plan_layout(config: Config, world_size: int) -> Layout:
    """Plan the layout of ``world_size`` ranks.

    Takes the whole config: degrees and batch must fit model and sequence (sections parallel, train, model and data).

    Raises:
        UserError: sizes do not divide, or DeepSpeed is known to refuse the layout or to compute it wrongly.
    """
    parallel, train, experts = config.parallel, config.train, config.model.moe.experts
    pipeline, expert = parallel.pipeline, parallel.expert
    if parallel.zero == 0:
        raise UserError("parallel.zero is 0: DeepSpeed clips gradients wrongly without ZeRO; use parallel.zero=1")
    if parallel.zero >= 2 and pipeline > 1:
        raise UserError(
            f"parallel.zero is {parallel.zero} with parallel.pipeline {pipeline}: DeepSpeed's pipeline allows ZeRO-1 only; "
            f"use parallel.zero=1 or parallel.pipeline=1"
        )
    if world_size % pipeline:
        raise UserError(
            f"parallel.pipeline {pipeline} does not divide the {world_size} ranks; use a multiple of {pipeline} ranks"
        )
    data = world_size // pipeline
    if data % expert:
        raise UserError(
            f"parallel.expert {expert} does not divide the {data} data-parallel ranks ({world_size} ranks / pipeline "
            f"{pipeline}); use parallel.expert={_largest_divisor(data, expert)} or more ranks"
        )
    if experts % expert:
        raise UserError(
            f"parallel.expert {expert} does not divide model.moe.experts {experts}; "
            f"use parallel.expert={_largest_divisor(experts, expert)}"
        )
    if train.global_batch % (train.micro_batch * data):
        raise UserError(
            f"train.global_batch {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch} x "
            f"{data} data-parallel ranks; use train.global_batch={_round_up(train.global_batch, train.micro_batch * data)}"
        )
    layers = layer_names(config.model)
    sparse_blocks = sum(layers.values())
    if expert > 1 and sparse_blocks == 0:
        raise UserError(
            f"parallel.expert is {expert} but no block is sparse; use parallel.expert=1, "
            f"model.vision.sparse_every or model.decoder.sparse_every"
        )
    if pipeline > len(layers):
        raise UserError(f"parallel.pipeline {pipeline} is more than the {len(layers)} layers of the model")
    if expert > 1 and pipeline > sparse_blocks:
        raise UserError(
            f"parallel.pipeline {pipeline} with parallel.expert > 1 needs a sparse block in each stage, but the model has "
            f"{sparse_blocks}; use parallel.pipeline={sparse_blocks} or set model.vision.sparse_every"
        )
    return Layout(pipeline, data, expert, parallel.zero, train.global_batch // (train.micro_batch * data), config)


def _partition(size: ModelSize, stages: int, needs_experts: bool) -> list[int]:
    """Cut the layers into contiguous stages so that the largest one has the fewest FLOPs.

    Under expert parallelism each stage needs a sparse block: DeepSpeed's optimizer runs one collective per expert-parallel
    group, and hangs if a stage without experts never joins it.
    """
    layers = size.layers
    flops = [0.0, *accumulate(layer.flops for layer in layers)]
    sparse = [0, *accumulate(int(layer.sparse) for layer in layers)]
    infinite = float("inf")
    best = [[infinite] * (len(layers) + 1) for _ in range(stages + 1)]
    cut = [[0] * (len(layers) + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for stage in range(1, stages + 1):
        for end in range(stage, len(layers) + 1):
            for start in range(stage - 1, end):
                if needs_experts and sparse[end] == sparse[start]:
                    continue
                cost = max(best[stage - 1][start], flops[end] - flops[start])
                if cost < best[stage][end]:
                    best[stage][end], cut[stage][end] = cost, start
    bounds = [len(layers)]
    for stage in range(stages, 0, -1):
        bounds.append(cut[stage][bounds[-1]])
    return bounds[::-1]


def stage_layers(size: ModelSize, layout: Layout, stage: int) -> tuple[LayerSize, ...]:
    """Return the layers of a stage."""
    return size.layers[layout.bounds[stage] : layout.bounds[stage + 1]]


def _largest_divisor(number: int, at_most: int) -> int:
    return max(d for d in range(1, min(number, at_most) + 1) if number % d == 0)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
