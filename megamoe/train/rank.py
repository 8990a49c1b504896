"""Run one rank of `megamoe train`: check everything that can be wrong, then join the others and train."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megamoe.checkpoint.reading import find_checkpoint
from megamoe.config import Config, dump_config
from megamoe.core.errors import DataError, UserError
from megamoe.core.exit_status import STOPPED
from megamoe.core.files import atomic_file
from megamoe.core.run_folder import RunFolder
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.from_config import open_data_set
from megamoe.metrics.metrics_file import refuse_existing
from megamoe.parallel.layout import plan_layout
from megamoe.train.stop_request import StopRequest
from megamoe.train.watchdog import Watchdog


def train(config: Config, resume: str) -> int:
    """Train as rank RANK of WORLD_SIZE.

    Args:
        config: The resolved config.
        resume: ``auto`` resumes from the newest good checkpoint of the run's folder, if there is one. ``none`` starts a
            new run. Anything else is a run or checkpoint folder to resume from.

    Returns:
        The exit status: 0 if all steps are done, 75 if a rank was asked to stop and all ranks have saved.

    Raises:
        UserError: the request is wrong. What can be checked without the other ranks is checked before joining them.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    stop = StopRequest(rank, config.launch.stop_grace)
    watchdog = Watchdog(rank, config.train.watchdog_seconds)
    layout = plan_layout(config, world_size)
    if config.model.attention == "flex" and not torch.cuda.is_available():
        raise UserError("model.attention is flex, which trains on CUDA only; use model.attention=sdpa or auto")
    if resume == "none":
        refuse_existing(config.run.folder)
    elif resume != "auto":
        find_checkpoint(Path(resume))
    tokenizer = _tokenizer(config)
    data = open_data_set(config.data, RunFolder(config.run.folder).index)
    if rank == 0:
        prepare_folder(config, tokenizer)

    from megamoe.parallel.deepspeed.process_group import joined_world  # imports DeepSpeed, which takes seconds

    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with joined_world() as device:
        from megamoe.train.trainer import Trainer

        trainer = Trainer(config, layout, tokenizer, data, device, resume, stop, watchdog)
        if not trainer.run():
            return STOPPED
    watchdog.enter("copies the last checkpoint to checkpoint.mirror", trainer.step, slow=True)
    trainer.checkpointer.finish_mirror()  # alone: the other ranks need not wait
    return 0


def prepare_folder(config: Config, tokenizer: Tokenizer) -> None:
    """Create the run's folder with the resolved config and the tokenizer in it, so that it can be moved."""
    folder = config.run.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(RunFolder(folder).config) as file:
            file.write(dump_config(config).encode())
        with atomic_file(RunFolder(folder).tokenizer) as file:
            file.write(tokenizer.path.read_bytes())
    except OSError as error:
        raise UserError(f"run.dir {folder}: cannot be written ({error.strerror}); free space or choose another") from error


def _tokenizer(config: Config) -> Tokenizer:
    if config.data.tokenizer is None:
        raise UserError("data.tokenizer is not set: make one with `megamoe data tokenizer SHARDS OUT --vocab-size V`")
    tokenizer = Tokenizer(config.data.tokenizer)
    if tokenizer.size > config.model.decoder.vocab_size:
        raise DataError(
            f"data.tokenizer {config.data.tokenizer}: has {tokenizer.size} pieces, more than model.decoder.vocab_size "
            f"{config.model.decoder.vocab_size}; wrong tokenizer, or raise vocab_size"
        )
    return tokenizer
