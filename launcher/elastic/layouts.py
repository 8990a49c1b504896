"""Choose a layout for a number of ranks that the config's layout does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megamoe.config import Config
from megamoe.config.launch import LaunchConfig
from megamoe.core.errors import UserError
from megamoe.parallel.layout import Layout, plan_layout


def choose_layout(config: Config, ranks: int) -> Layout | None:
    """Return the layout of ``ranks`` ranks that is nearest to the config's; None when no layout fits.

    Global batch, micro-batch and so the order of samples stay; accumulation follows. Near is what changes the fewest
    factors of two in ``parallel.pipeline`` and ``parallel.expert``; of two that are equally near, the one that leaves
    each rank less of the model to hold (stages share all of it, expert parallelism only the experts).
    """
    parallel = config.parallel

    def distance(layout: Layout) -> tuple[float, float, int]:
        stages, experts = layout.pipeline / parallel.pipeline, layout.expert / parallel.expert
        return round(abs(math.log2(stages)) + abs(math.log2(experts)), 9), -stages * experts, -layout.pipeline

    return min(_fitting(config, ranks), key=distance, default=None)


def layout_overrides(layout: Layout) -> list[str]:
    """Return the ``KEY=VALUE`` settings that make ranks use ``layout``."""
    return [f"parallel.pipeline={layout.pipeline}", f"parallel.expert={layout.expert}"]


def ranks_per_node(launch: LaunchConfig) -> int:
    """Return the ranks of each node: as set, or one per GPU, or one."""
    return launch.ranks_per_node or launch.gpus_per_node or 1


def team_sizes(config: Config) -> list[int]:
    """Return the numbers of nodes that the run can work with, from ``launch.min_nodes`` to ``launch.nodes``.

    Raises:
        UserError: there are none.
    """
    launch, ranks = config.launch, ranks_per_node(config.launch)
    fewest = launch.min_nodes or 1
    if fewest > launch.nodes:
        raise UserError(f"launch.min_nodes {fewest} is more than launch.nodes {launch.nodes}; lower it")
    sizes = [nodes for nodes in range(fewest, launch.nodes + 1) if choose_layout(config, nodes * ranks) is not None]
    if not sizes:
        numbers = str(fewest) if fewest == launch.nodes else f"{fewest} to {launch.nodes}"
        raise UserError(
            f"launch.nodes {launch.nodes}: no layout fits {numbers} nodes with {ranks} ranks each; choose numbers that "
            f"divide train.global_batch / train.micro_batch ({config.train.global_batch // config.train.micro_batch})"
        )
    return sizes


def _fitting(config: Config, ranks: int) -> Iterator[Layout]:
    for pipeline in _divisors(ranks):
        for expert in _divisors(ranks // pipeline):
            parallel = config.parallel.model_copy(update={"pipeline": pipeline, "expert": expert})
            try:
                yield plan_layout(config.model_copy(update={"parallel": parallel}), ranks)
            except UserError:
                continue


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
