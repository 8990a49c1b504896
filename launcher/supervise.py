"""Runs a training on many nodes, from the batch host: decides who works, and what happens when one is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.cluster import Cluster
from megamoe.config import Config


def supervise(config_path: Path, overrides: Sequence[str], resume: str, settings: Config, cluster: Cluster) -> int:
    """Train until all steps are done, on the nodes that ``cluster`` gives.

    Args:
        config_path: config file, absolute, on a file system that all nodes share.
        overrides: ``KEY=VALUE`` settings, handed to the ranks as they are.
        resume: ``auto``, ``none`` or a checkpoint, for the first attempt.
        settings: the resolved config.
        cluster: who gives out nodes.

    Returns:
        Exit status, as of ``launch_local``; 75 also when there are too few nodes and the cluster starts the run again.
    """
    raise NotImplementedError
