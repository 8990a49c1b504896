"""Hold the state of a run while it trains: all that a checkpoint says besides tensors."""

from __future__ import annotations

from dataclasses import replace

from megamoe.checkpoint.train_state import TrainState, package_versions
from megamoe.config import Config
from megamoe.data.loader.step_loader import StepLoader
from megamoe.data.order.position import DataState
from megamoe.metrics.counters import Counters
from megamoe.train.guard import Guard


class LiveState:
    """The state as it changes from step to step; a :class:`TrainState` is a snapshot of it.

    Args:
        config: The resolved config.
        fingerprints: ``tokenizer`` and ``data``.
        loader: This rank's loader, which holds its part of the position; None for a rank that loads no data.

    Attributes:
        counters: What has been counted.
        guard: Judges the steps, and knows the spikes and rollbacks so far.
    """

    def __init__(self, config: Config, fingerprints: dict[str, str], loader: StepLoader | None):
        self.counters, self.guard = Counters(), Guard(config.train)
        self._loader, self._limits = loader, config.train
        self._blank = TrainState(
            self.counters,
            position={},
            config=config.model_dump(mode="json"),
            tokenizer=fingerprints["tokenizer"],
            data=fingerprints["data"],
            versions=package_versions(),
        )

    @property
    def position(self) -> DataState | None:
        """This rank's part of the position in the data; None for a rank that loads no data."""
        return self._loader.state if self._loader is not None else None

    def snapshot(self) -> TrainState:
        """Return the state to save, without the position: the checkpointer joins those of all ranks."""
        return replace(self._blank, counters=self.counters, guard=self.guard.to_json())

    def restore(self, saved: TrainState) -> None:
        """Continue from a checkpoint, whose tensors the engine has loaded.

        Raises:
            DataError: the position is malformed.
            CheckpointError: the guard's state is malformed.
        """
        position = DataState.from_json(saved.position, "checkpoint")
        self.counters = replace(saved.counters, drawn=sum(position.cursors.values()))
        self.guard = Guard(self._limits, saved.guard)
        if self._loader is not None:
            self._loader.go_on_from(position)
