"""Saving and loading the state of a training run across its ranks.

A save is the same whether the training goes on meanwhile or not. A thread of each rank writes the rank's file, and one of
rank 0 then the manifest, which it publishes. These threads never talk to other ranks: between two steps the training
threads add up over all ranks who is still writing, so that all learn of the end of a save, or of its failure, at the same
step, and no collective is ever in flight beside those of the training.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.checkpoint.contents import moments_of
from megamoe.checkpoint.folders import checkpoint_name, retain
from megamoe.checkpoint.manifest import read_manifest
from megamoe.checkpoint.mirror import Mirror
from megamoe.checkpoint.pieces import PieceLoadPlanner, Slot, WritePlan, flat_slot, plan_writes, rank_file
from megamoe.checkpoint.reading import read_pieces
from megamoe.checkpoint.remote import RemoteCheckpoints
from megamoe.checkpoint.snapshot import Snapshot
from megamoe.checkpoint.store import complete, write_pieces
from megamoe.checkpoint.tensorfile import FileSum
from megamoe.checkpoint.train_state import TrainState
from megamoe.config import Config
from megamoe.core.errors import CheckpointError
from megamoe.data.order.position import DataState, joined
from megamoe.parallel.broadcast import from_rank_0
from megamoe.parallel.deepspeed.engine import TrainEngine
from megamoe.parallel.deepspeed.main_parameters import create_moments, owned_pieces, refresh_weights


@dataclass
class _Save:
    """A save under way.

    Attributes:
        folder: The checkpoint.
        state: What it says of the run, but for the position in the data.
        position: That of this rank's lanes, if it loads data.
        prune: Whether older ones go when it is published.
        work: What a thread of this rank does for it, or did.
        publishing: Whether all files are written, and rank 0 is at the manifest.
    """

    folder: Path
    state: TrainState
    position: DataState | None
    prune: bool
    work: Future[FileSum | None]
    publishing: bool = False


class Checkpointer:
    """Writes and reads the checkpoints of a run; all ranks call each method together, between two steps.

    Whichever method finds that a save has failed raises ``CheckpointError``, on all ranks alike; the checkpoints before
    it are untouched.
    """

    def __init__(self, config: Config, engine: TrainEngine):
        self.run, self.settings, self.engine = config.run.folder, config.checkpoint, engine
        self.moments = moments_of(config.optim)
        self._snapshot = Snapshot(engine.device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._plan: WritePlan | None = None
        self._save: _Save | None = None
        self._mirror: Mirror | None = None
        if self.settings.mirror is not None and dist.get_rank() == 0:
            self._mirror = Mirror(RemoteCheckpoints(self.settings.mirror), self.run, self.settings)

    @property
    def busy(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._save is not None

    def save(self, state: TrainState, position: DataState | None, last: bool = False) -> None:
        """Write a checkpoint, publish it when all ranks are done, and delete those that need not stay.

        With ``checkpoint.async`` this returns as soon as a copy is taken; if the checkpoint before is still being
        written, it waits for that, or leaves this one out, as ``checkpoint.when_busy`` says.

        Args:
            state: State of the run; that of rank 0 counts, and its position is put together from all ranks.
            position: That of this rank's lanes; None for a rank that loads no data.
            last: The training ends here: return when this checkpoint is published.

        Raises:
            CheckpointError: this one or the one before could not be written.
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
        """Write a checkpoint and publish it when all ranks are done; no other step's is touched.

        Raises:
            CheckpointError: it could not be written.
        """
        self._begin(state, position, prune=False, copy=False)
        self.finish()

    def poll(self) -> None:
        """Go on with the save under way, if there is one, without waiting for it; once per step.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._save is not None:
            self._advance(self._save)

    def finish(self) -> None:
        """Wait until no save is under way.

        Raises:
            CheckpointError: it could not be written.
        """
        while self._save is not None:
            wait([self._save.work])
            self._advance(self._save)

    def finish_mirror(self) -> None:
        """Wait until checkpoint.mirror has what the run's folder has. Other ranks need not be there any more.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._mirror is not None:
            self._mirror.finish()

    def load(self, folder: Path) -> TrainState:
        """Put the state of a checkpoint into the engine, under whatever layout wrote it. No save is under way.

        Raises:
            DamagedCheckpoint: something is missing or damaged; another one may be loaded instead.
            CheckpointError: it is of another model.
        """
        if self._mirror is not None:
            self._mirror.wait()  # what is loaded may be the beginning of another history
        state = from_rank_0(lambda: TrainState.from_json(read_manifest(folder).state, str(folder)))
        create_moments(self.engine, self.moments, state.counters.updates)
        rng = self._rng_slot()
        # A layout with more ranks than the one that wrote has no generator state for the new ranks.
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
        folder = self.run / "checkpoints" / checkpoint_name(state.step)
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
        """Take the save a step further if all ranks have come to the same point."""
        done = save.work.done()
        failed = done and save.work.exception() is not None
        counts = torch.tensor([not done, failed], dtype=torch.int64, device=self.engine.device)
        dist.all_reduce(counts)
        at_work, failures = counts.tolist()
        if at_work:
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
        """Why a save has failed on some rank, the same on all."""
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
            print(f"megamoe: {text}", file=sys.stderr, flush=True)
