"""Save and load the state of a training run across its ranks.

Sync and async saves share one path: on each rank a thread writes the rank's file; when all ranks are done, a thread of
rank 0 writes and publishes the manifest. These threads never communicate with other ranks. Instead, between two steps, the
training threads count the ranks that are still writing. So all ranks learn of the end of a save, or of its failure, at the
same step, and no collective ever runs beside those of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.checkpoint.contents import moments_of
from megamoe.checkpoint.folders import retain
from megamoe.checkpoint.manifest import read_manifest
from megamoe.checkpoint.mirror import Mirror
from megamoe.checkpoint.pieces import PieceLoadPlanner, Slot, WritePlan, flat_slot, plan_writes, rank_file
from megamoe.checkpoint.reading import read_pieces
from megamoe.checkpoint.remote import RemoteCheckpoints
from megamoe.checkpoint.snapshot import Snapshot
from megamoe.checkpoint.store import complete, write_pieces
from megamoe.checkpoint.tensorfile import FileSum
from megamoe.checkpoint.train_state import TrainState
from megamoe.config import OptimConfig
from megamoe.config.training import CheckpointConfig
from megamoe.core.errors import CheckpointError
from megamoe.core.log import say
from megamoe.core.run_folder import RunFolder
from megamoe.data.order.position import DataState, joined
from megamoe.parallel.broadcast import from_rank_0
from megamoe.parallel.deepspeed.engine import TrainEngine
from megamoe.parallel.deepspeed.main_parameters import create_moments, owned_pieces, refresh_weights


@dataclass
class _Save:
    """A save in progress.

    Attributes:
        folder: The checkpoint.
        state: State of the run, still without the position in the data.
        position: Position of this rank's lanes, if it loads data.
        prune: Whether to delete older checkpoints after publishing this one.
        work: This rank's current or finished work for the save.
        publishing: Whether all files are written and rank 0 writes the manifest.
    """

    folder: Path
    state: TrainState
    position: DataState | None
    prune: bool
    work: Future[FileSum | None]
    publishing: bool = False


class Checkpointer:
    """Writes and reads the checkpoints of a run; all ranks call each method together, between two steps.

    The method that finds out about a failed save raises ``CheckpointError``, on all ranks alike. Earlier checkpoints stay
    untouched.

    Args:
        run: Folder of the run.
        settings: When to wait, how many checkpoints to keep, and where to mirror them.
        optim: Determines which moments a checkpoint has.
        engine: The engine whose state is saved and loaded.
    """

    def __init__(self, run: Path, settings: CheckpointConfig, optim: OptimConfig, engine: TrainEngine):
        self.run, self.settings, self.engine = run, settings, engine
        self.moments = moments_of(optim)
        self._snapshot = Snapshot(engine.device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._plan: WritePlan | None = None
        self._save: _Save | None = None
        self._mirror: Mirror | None = None
        if self.settings.mirror is not None and dist.get_rank() == 0:
            self._mirror = Mirror(RemoteCheckpoints(self.settings.mirror), self.run, self.settings)

    @property
    def busy(self) -> bool:
        """Return whether a save is in progress; the same on all ranks."""
        return self._save is not None

    def save(self, state: TrainState, position: DataState | None, last: bool = False) -> None:
        """Write a checkpoint, publish it when all ranks are done, and delete the ones that need not be kept.

        With ``checkpoint.async``, return as soon as a copy is taken. If the previous checkpoint is still being written,
        ``checkpoint.when_busy`` decides: wait for it, or skip this one.

        Args:
            state: State of the run; rank 0's is written, with the position joined from all ranks.
            position: Position of this rank's lanes; None for a rank that loads no data.
            last: Whether training ends here; if so, return only when this checkpoint is published.

        Raises:
            CheckpointError: this checkpoint or the previous one could not be written.
        """
        if self._save is not None:
            if self.settings.when_busy == "skip" and not last:
                self._say(f"step {state.step}: no checkpoint, {self._save.folder.name} is still being written")
                return
            self.finish()
        background = self.settings.in_background and not last
        self._begin(state, position, prune=True, copy=background)
        if not background:
            self.finish()

    def write(self, state: TrainState, position: DataState | None) -> None:
        """Write a checkpoint and publish it when all ranks are done; delete no other.

        Raises:
            CheckpointError: it could not be written.
        """
        self._begin(state, position, prune=False, copy=False)
        self.finish()

    def poll(self) -> None:
        """Advance the save in progress, if any, without waiting for it; call once per step.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._save is not None:
            self._advance(self._save)

    def finish(self) -> None:
        """Wait until no save is in progress.

        Raises:
            CheckpointError: it could not be written.
        """
        while self._save is not None:
            wait([self._save.work])
            self._advance(self._save)

    def finish_mirror(self) -> None:
        """Wait until checkpoint.mirror has what the run's folder has. Other ranks may have left already.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._mirror is not None:
            self._mirror.finish()

    def load(self, folder: Path) -> TrainState:
        """Load a checkpoint into the engine, whatever layout wrote it. No save may be in progress.

        Raises:
            DamagedCheckpoint: something is missing or damaged; another checkpoint may be loaded instead.
            CheckpointError: it is of another model.
        """
        if self._mirror is not None:
            self._mirror.wait()  # the load may begin another history
        state = from_rank_0(lambda: TrainState.from_json(read_manifest(folder).state, str(folder)))
        create_moments(self.engine, self.moments, state.counters.updates)
        rng = self._rng_slot()
        # If the layout that wrote had fewer ranks, there is no generator state for the additional ranks.
        read_pieces(folder, PieceLoadPlanner(self._slots(), optional=[rng]), distributed=True)
        torch.set_rng_state(rng.data)
        refresh_weights(self.engine)
        return state

    def _begin(self, state: TrainState, position: DataState | None, prune: bool, copy: bool) -> None:
        slots = [*self._slots(), self._rng_slot()]
        if self._plan is None:
            self._plan = plan_writes(slots)
        pieces = {slot.key: slot.data for slot in slots if slot.key in self._plan.mine}
        assert len(pieces) == len(self._plan.mine), "what a rank owns does not change during a run"
        folder = RunFolder(self.run).checkpoint(state.step)
        copied = None
        if copy:
            pieces, copied = self._snapshot.take(pieces)
        rank = dist.get_rank()

        def write() -> FileSum | None:
            if copied is not None:
                copied()
            return write_pieces(folder, rank, pieces)

        self._save = _Save(folder, state, position, prune, self._thread.submit(write))

    def _advance(self, save: _Save) -> None:
        """Advance the save by one stage if all ranks have finished the current one."""
        done = save.work.done()
        failed = done and save.work.exception() is not None
        counts = torch.tensor([not done, failed], dtype=torch.int64, device=self.engine.device)
        dist.all_reduce(counts)
        writing, failures = counts.tolist()
        if writing:
            return
        if failures:
            self._save = None
            raise self._failure(save)
        if save.publishing:
            self._save = None
            return
        save.publishing = True
        results: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((save.work.result(), save.position), results, dst=0)
        if results is not None:
            files = {rank_file(rank): sums for rank, (sums, _) in enumerate(results) if sums is not None}
            position = joined(part for _, part in results)
            state = save.state if position is None else replace(save.state, position=position.to_json())
            save.work = self._thread.submit(self._publish, save.folder, state, files, save.prune)

    def _publish(self, folder: Path, state: TrainState, files: Mapping[str, FileSum], prune: bool) -> None:
        assert self._plan is not None
        complete(folder, state.to_json(), self.engine.layout.describe(), files, self._plan.tensors)
        if prune:
            retain(self.run, state.step, self.settings.keep, self.settings.keep_every)
        if self._mirror is not None:
            self._mirror.changed()

    def _failure(self, save: _Save) -> CheckpointError:
        """Return why a save failed on some rank, the same error on all ranks."""
        mine = save.work.exception()
        everyone: list[BaseException | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        rank, reason = next((rank, error) for rank, error in enumerate(everyone) if error is not None)
        if isinstance(reason, CheckpointError):
            return reason
        return CheckpointError(f"checkpoint {save.folder}: rank {rank} could not write it ({reason!r})")

    def _slots(self) -> list[Slot]:
        pieces = owned_pieces(self.engine, self.moments)
        return [flat_slot(piece.name, piece.shape, piece.start, piece.data) for piece in pieces]

    def _rng_slot(self) -> Slot:
        rng: Tensor = torch.get_rng_state()
        return Slot(f"rng/rank-{dist.get_rank():05d}", rng.numel(), 0, rng)

    @staticmethod
    def _say(text: str) -> None:
        if dist.get_rank() == 0:
            say(text)
