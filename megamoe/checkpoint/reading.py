"""Read the weights of a run or checkpoint into one process, whatever layout wrote them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from megamoe.checkpoint.folders import newest_checkpoint
from megamoe.checkpoint.manifest import read_manifest
from megamoe.checkpoint.pieces import PieceLoadPlanner, flat_slot
from megamoe.checkpoint.store import SafetensorsReader
from megamoe.checkpoint.train_state import TrainState
from megamoe.config import Config
from megamoe.core.errors import CheckpointError, DamagedCheckpoint
from megamoe.core.run_folder import RunFolder
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.model.parameter import ExpertShard
from megamoe.model.vlm import VisionLanguageModel, layer_specs, named_parameters


@dataclass(frozen=True)
class LoadedModel:
    """A trained model in one process.

    Attributes:
        config: Config of the run that wrote it.
        model: The model, fp32, in eval mode.
        tokenizer: The run's tokenizer.
        step: Optimizer steps that trained it.
        run: Folder of the run, if the checkpoint is in one.
    """

    config: Config
    model: VisionLanguageModel
    tokenizer: Tokenizer
    step: int
    run: Path | None


def find_checkpoint(source: Path) -> Path:
    """Return ``source`` if it is a checkpoint, or the newest checkpoint if it is a run.

    Raises:
        CheckpointError: it is neither.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; give a run or a checkpoint")
    if (source / "manifest.json").is_file():
        return source
    newest = newest_checkpoint(source)
    if newest is None:
        raise CheckpointError(f"{source}: neither a checkpoint nor a run with one")
    return newest


def load_model(source: Path) -> LoadedModel:
    """Load the weights of a run's newest checkpoint, or of a given checkpoint folder.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or the tokenizer is not the run's.
    """
    folder = find_checkpoint(source)
    state = TrainState.from_json(read_manifest(folder).state, str(folder))
    config = state.parsed_config(str(folder))
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    copy = RunFolder(run).tokenizer if run is not None else None
    path = copy if copy is not None and copy.is_file() else config.data.tokenizer
    if path is None:
        raise CheckpointError(f"checkpoint {folder}: its config names no data.tokenizer")
    tokenizer = Tokenizer(path)
    if tokenizer.fingerprint != state.tokenizer:
        raise CheckpointError(f"checkpoint {folder} was made with another tokenizer than {path} is now")
    model = VisionLanguageModel(layer_specs(config.model, tokenizer.image_id), ExpertShard(), seed=None)
    slots = []
    for spec, layer in zip(model.specs, model.layers, strict=True):
        for name, parameter in named_parameters(spec.name, layer):
            slots.append(flat_slot(f"weight/{name}", tuple(parameter.shape), 0, parameter.detach().view(-1)))
    read_pieces(folder, PieceLoadPlanner(slots), distributed=False)
    return LoadedModel(config, model.eval().requires_grad_(False), tokenizer, state.step, run)


def read_pieces(folder: Path, planner: PieceLoadPlanner, distributed: bool) -> None:
    """Fill the planner's slots from a checkpoint. If ``distributed``, all ranks call and get the same result.

    Raises:
        DamagedCheckpoint: something is missing or damaged; raised on all ranks if one of them finds it.
        CheckpointError: it is of another model, or cannot be loaded for another reason.
    """
    rank = dist.get_rank() if distributed else 0
    reason: CheckpointError | None = None
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each rank plans its reads alone
    try:
        dcp.load(  # type: ignore[attr-defined]
            {}, storage_reader=SafetensorsReader(folder, all_files=rank == 0), planner=planner, no_dist=True
        )
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        reason = (
            cause
            if isinstance(cause, CheckpointError)
            else CheckpointError(f"checkpoint {folder}: rank {rank} cannot load it ({cause!r})")
        )
    if distributed:
        reasons: list[CheckpointError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        failures = [each for each in reasons if each is not None]
        # Another checkpoint helps only if damage is the only problem.
        reason = next((each for each in failures if not isinstance(each, DamagedCheckpoint)), next(iter(failures), None))
    if reason is not None:
        raise reason
