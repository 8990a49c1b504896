"""Go back to a checkpoint when the loss spikes step after step without an update: the weights themselves are at fault."""

from __future__ import annotations

import torch.distributed as dist

from megamoe.checkpoint.checkpointer import Checkpointer
from megamoe.checkpoint.train_state import TrainState
from megamoe.config import Config
from megamoe.core.errors import SpikeError
from megamoe.core.log import say
from megamoe.train.guard import Guard
from megamoe.train.resume import Resume, checkpoints_before

_REMEDY = "look at their samples in the run's folder lost/, raise train.spike_threshold, or start anew with less optim.lr"


def go_back(
    config: Config, fingerprints: dict[str, str], checkpointer: Checkpointer, guard: Guard
) -> tuple[TrainState, range]:
    """Load a checkpoint from before the spikes in a row. All ranks call, with their records closed.

    Returns:
        The loaded state, and the steps to pass over: the spikes and up to ``train.spike_margin`` steps before them, whose
        updates led there.

    Raises:
        SpikeError: there is no older checkpoint, or the run has gone back too often.
    """
    limits = config.train
    first, last = guard.spikes_in_a_row[0], guard.spikes_in_a_row[-1]
    found = (
        f"steps {first} to {last}: {len(guard.spikes_in_a_row)} loss spikes in a row (train.max_spikes {limits.max_spikes})"
    )
    if guard.rollbacks_in_a_row >= limits.max_rollbacks:
        raise SpikeError(
            f"{found} after {guard.rollbacks_in_a_row} rollbacks without a new checkpoint (train.max_rollbacks); {_REMEDY}"
        )
    resume = Resume(config, "auto", fingerprints, checkpoints_before(config.run.folder, first, limits.spike_margin))
    state = resume.load(checkpointer)
    if state is None:
        raise SpikeError(f"{found}, and no checkpoint is older; {_REMEDY}, with a lower checkpoint.every")
    resume.abandon_after(state.step)
    steps = range(max(state.step + 1, first - limits.spike_margin), last + 1)
    if dist.get_rank() == 0:
        line = f"{found}: goes back to step {state.step} and passes over steps {steps[0]} to {last}"
        say(line)
    return state, steps
