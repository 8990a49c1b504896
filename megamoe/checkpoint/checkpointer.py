"""Saving and loading the state of a training run across its ranks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from megamoe.checkpoint.contents import moments_of
from megamoe.checkpoint.folders import checkpoint_name, checkpoints_of, delete, publish, to_delete
from megamoe.checkpoint.load import read_pieces
from megamoe.checkpoint.manifest import read_manifest
from megamoe.checkpoint.pieces import PieceLoadPlanner, PieceSavePlanner, Slot, flat_slot
from megamoe.checkpoint.state import TrainState
from megamoe.checkpoint.store import SafetensorsWriter
from megamoe.config import Config
from megamoe.errors import CheckpointError
from megamoe.parallel.agree import from_rank_0
from megamoe.parallel.engine import TrainEngine
from megamoe.parallel.master import create_moments, owned_pieces, refresh_weights


class Checkpointer:
    """Writes and reads the checkpoints of a run; all ranks call each method together."""

    def __init__(self, config: Config, engine: TrainEngine):
        self.run, self.settings, self.engine = config.run.folder, config.checkpoint, engine
        self.moments = moments_of(config.optim)

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint, publish it when all ranks are done, and delete those that need not stay.

        Raises:
            CheckpointError: it could not be written; the previous ones are untouched.
        """
        folder = self.write(state)
        if dist.get_rank() == 0:
            # A later one is not of this history; it neither counts nor goes.
            found = {step: path for step, path in checkpoints_of(self.run) if step <= state.step}
            for step in to_delete(list(found), self.settings.keep, self.settings.keep_every):
                delete(found[step])
        dist.barrier()
        return folder

    def write(self, state: TrainState) -> Path:
        """Write a checkpoint and publish it when all ranks are done; no other step's is touched.

        Raises:
            CheckpointError: it could not be written; the previous ones are untouched.
        """
        folder = self.run / "checkpoints" / checkpoint_name(state.step)
        rank = dist.get_rank()
        try:
            dcp.save(  # type: ignore[attr-defined]
                {},
                storage_writer=SafetensorsWriter(folder, rank, state.to_json(), self.engine.layout.describe()),
                planner=PieceSavePlanner([*self._slots(), self._rng_slot()]),
            )
        except dcp.api.CheckpointException as error:  # the same on all ranks
            failed, (reason, _) = next(iter(error.failures.items()))
            raise (
                reason
                if isinstance(reason, CheckpointError)
                else CheckpointError(f"checkpoint {folder}: rank {failed} could not write it ({reason})")
            ) from error
        if rank == 0:
            publish(folder)
        dist.barrier()
        return folder

    def load(self, folder: Path) -> TrainState:
        """Put the state of a checkpoint into the engine, under whatever layout wrote it.

        Raises:
            DamagedCheckpoint: something is missing or damaged; another one may be loaded instead.
            CheckpointError: it is of another model.
        """
        state = from_rank_0(lambda: TrainState.from_json(read_manifest(folder).state, str(folder)))
        create_moments(self.engine, self.moments, state.updates)
        rng = self._rng_slot()
        # A layout with more ranks than the one that wrote has no generator state for the new ranks.
        read_pieces(folder, PieceLoadPlanner(self._slots(), optional=[rng]), distributed=True)
        torch.set_rng_state(rng.data)
        refresh_weights(self.engine)
        return state

    def _slots(self) -> list[Slot]:
        pieces = owned_pieces(self.engine, self.moments)
        return [flat_slot(piece.name, piece.shape, piece.start, piece.data) for piece in pieces]

    def _rng_slot(self) -> Slot:
        rng = torch.get_rng_state()
        return Slot(f"rng/rank-{dist.get_rank():05d}", rng.numel(), 0, rng)
