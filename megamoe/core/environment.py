"""What the environment says of this process."""

from __future__ import annotations

import os


def is_rank() -> bool:
    """Whether this process is one rank of a run, as torchrun, srun, mpirun or our launcher start it."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
