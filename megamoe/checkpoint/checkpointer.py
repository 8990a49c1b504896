"""Saving and loading the state of a training run across its ranks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from megamoe.checkpoint.load import read_pieces
from megamoe.checkpoint.pieces import PieceLoadPlanner, PieceSavePlanner, Slot, flat_slot
from megamoe.checkpoint.state import TrainState
from megamoe.checkpoint.store import (
    SafetensorsReader,
    SafetensorsWriter,
    checkpoint_name,
    prune,
    publish,
    read_manifest,
)
from megamoe.config import Config
from megamoe.errors import CheckpointError
from megamoe.parallel.engine import TrainEngine
from megamoe.parallel.master import MOMENTS, create_moments, owned_pieces, refresh_weights


class Checkpointer:
    """Writes and reads the checkpoints of a run; all ranks call each method together."""

    def __init__(self, config: Config, engine: TrainEngine):
        self.run, self.keep, self.engine = config.run.folder, config.checkpoint.keep, engine
        optim = config.optim
        # Without momentum SGD has no state.
        self.moments = MOMENTS[optim.name] if optim.name == "adamw" or optim.momentum > 0 else ()

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint, publish it when all ranks are done, and delete the oldest.

        Raises:
            CheckpointError: it could not be written; the previous ones are untouched.
        """
        folder = self.run / "checkpoints" / checkpoint_name(state.step)
        rank = dist.get_rank()
        try:
            dcp.save(  # type: ignore[attr-defined]
                {},
                storage_writer=SafetensorsWriter(folder, rank, state.to_json()),
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
            prune(self.run, self.keep)
        dist.barrier()
        return folder

    def load(self, folder: Path) -> TrainState:
        """Put the state of a checkpoint into the engine, under whatever layout wrote it.

        Raises:
            CheckpointError: something is missing, damaged, or of another model.
        """
        state = TrainState.from_json(read_manifest(folder).get("state"), str(folder))
        create_moments(self.engine, self.moments, state.step)
        slots = self._slots()
        rng = self._rng_slot()
        # A layout with more ranks than the one that wrote has no generator state for the new ranks.
        if rng.name in SafetensorsReader(folder).read_metadata().state_dict_metadata:
            slots.append(rng)
        read_pieces(folder, PieceLoadPlanner(slots), distributed=True)
        torch.set_rng_state(rng.data)
        refresh_weights(self.engine)
        return state

    def _slots(self) -> list[Slot]:
        pieces = owned_pieces(self.engine, self.moments)
        return [flat_slot(piece.name, piece.shape, piece.start, piece.data) for piece in pieces]

    def _rng_slot(self) -> Slot:
        rng = torch.get_rng_state()
        return Slot(f"rng/rank-{dist.get_rank():05d}", rng.numel(), 0, rng)
