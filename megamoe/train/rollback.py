"""The way back when the loss spikes step after step although none of these steps was applied: the weights are at fault."""

from __future__ import annotations

import sys

import torch.distributed as dist

from megamoe.checkpoint.checkpointer import Checkpointer
from megamoe.checkpoint.train_state import TrainState
from megamoe.config import Config
from megamoe.core.errors import SpikeError
from megamoe.train.resume import Resume, checkpoints_before
from megamoe.train.spikes import SpikeWatch

_REMEDY = "look at their samples in the run's folder lost/, raise train.spike_threshold, or start anew with less optim.lr"


def go_back(
    config: Config, fingerprints: dict[str, str], checkpointer: Checkpointer, watch: SpikeWatch
) -> tuple[TrainState, range]:
    """Load a checkpoint from before the spikes in a row. All ranks call, with their records closed.

    Returns:
        The state that is loaded, and the steps to go past: the spikes, and up to ``train.spike_margin`` before them, since
        it was their updates that led there.

    Raises:
        SpikeError: no checkpoint is older, or this was done too often.
    """
    limits = config.train
    first, last = watch.in_a_row[0], watch.in_a_row[-1]
    what = f"steps {first} to {last}: {len(watch.in_a_row)} loss spikes in a row (train.max_spikes {limits.max_spikes})"
    if watch.rollbacks_in_a_row >= limits.max_rollbacks:
        raise SpikeError(
            f"{what} after {watch.rollbacks_in_a_row} rollbacks without a new checkpoint (train.max_rollbacks); {_REMEDY}"
        )
    history = Resume(config, "auto", fingerprints, checkpoints_before(config.run.folder, first, limits.spike_margin))
    state = history.load(checkpointer)
    if state is None:
        raise SpikeError(f"{what}, and no checkpoint is older; {_REMEDY}, with a lower checkpoint.every")
    history.leave_the_rest(state.step)
    past = range(max(state.step + 1, first - limits.spike_margin), last + 1)
    if dist.get_rank() == 0:
        line = f"{what}: goes back to step {state.step}, and past steps {past[0]} to {last}"
        print(f"megamoe: {line}", file=sys.stderr, flush=True)
    return state, past
