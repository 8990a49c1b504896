"""Choose the checkpoint that a run resumes from, alike on all ranks, and abandon the history after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megamoe.checkpoint.checkpointer import Checkpointer
from megamoe.checkpoint.folders import abandon, checkpoints_of, retain, tidy
from megamoe.checkpoint.manifest import check_sizes, read_manifest
from megamoe.checkpoint.reading import find_checkpoint
from megamoe.checkpoint.remote import RemoteCheckpoints
from megamoe.checkpoint.train_state import TrainState, check_fits
from megamoe.config import Config
from megamoe.core.errors import CheckpointError, DamagedCheckpoint
from megamoe.core.files import remove_unfinished
from megamoe.core.log import say
from megamoe.core.run_folder import RunFolder
from megamoe.data.order.position import DataState
from megamoe.metrics.audit import truncate_audit
from megamoe.parallel.broadcast import from_rank_0
from megamoe.train.records import truncate_lost


class Resume:
    """Get from ``--resume`` to a loaded state. All ranks construct it and call its methods together.

    Rank 0 chooses by manifests and file sizes, which takes a glance whatever the size of the model. Each rank compares
    checksums of what it reads anyway. If one of them finds damage, all ranks load the checkpoint before.

    Args:
        config: The resolved config.
        asked: ``auto``, ``none``, or a run or checkpoint folder.
        fingerprints: ``tokenizer`` and ``data``; a checkpoint must have the same ones.
        candidates: For ``auto``: checkpoints of the run to choose from, the preferred one last. None: all of them.

    Attributes:
        elsewhere: Whether the checkpoint is not in the run's own history: of another run, or abandoned before.

    Raises:
        DamagedCheckpoint: the requested checkpoint is damaged, or all of them are.
        CheckpointError: there is no checkpoint, or it is of another model, tokenizer or data.
    """

    def __init__(self, config: Config, asked: str, fingerprints: dict[str, str], candidates: Sequence[Path] | None = None):
        self._config, self._fingerprints, self._run = config, fingerprints, config.run.folder
        self._auto = asked == "auto"
        self._refused: list[str] = []  # on rank 0
        self._candidates: list[Path | int] = []  # on rank 0, the next one last; a bare step is in the mirror only
        mirror = config.checkpoint.mirror
        self._mirror = RemoteCheckpoints(mirror) if mirror is not None and dist.get_rank() == 0 else None
        if candidates is not None:
            self._candidates = list(candidates)
        elif asked in ("auto", "none"):
            self._candidates = from_rank_0(lambda: self._find_all(asked))
        self._next = from_rank_0(self._choose if asked in ("auto", "none") else lambda: self._only(Path(asked)))
        self.elsewhere = from_rank_0(self._is_elsewhere)

    def load(self, checkpointer: Checkpointer) -> TrainState | None:
        """Load the newest good checkpoint into the engine and return its state; None for a run from its beginning.

        Raises:
            DamagedCheckpoint: the requested checkpoint is damaged, or all of them are.
        """
        while self._next is not None:
            try:
                return checkpointer.load(self._next)
            except DamagedCheckpoint as error:  # the same on all ranks
                if not self._auto:
                    raise _with_remedy(error) from None
                if dist.get_rank() == 0:
                    self._refuse(error)
                self._next = from_rank_0(self._choose)
        return None

    def abandon_after(self, step: int) -> None:
        """Make the run's folder match the weights: set later checkpoints and other histories aside, cut the records."""
        if dist.get_rank() == 0:
            # Checkpoints first: if this is interrupted, the records are never shorter than the newest checkpoint.
            for folder in abandon(self._run, step, newer_only=not self.elsewhere):
                _say(f"{folder}: set aside, the run resumes from step {step}")
            self._abandon_in_mirror(step)
            for folder in tidy(self._run):
                _say(f"{folder}: half-written, removed")
            # A save that was interrupted right after publishing has not deleted the older ones yet.
            retain(self._run, step, self._config.checkpoint.keep, self._config.checkpoint.keep_every)
            # No rank writes into these folders now: indexing is done, and no data worker has started.
            for folder in (self._run, RunFolder(self._run).index):
                remove_unfinished(folder)
            truncate_audit(self._run, step)
            truncate_lost(self._run, step)
        dist.barrier()

    def _find_all(self, asked: str) -> list[Path | int]:
        """Find the checkpoints of the run, here and in the mirror, oldest first."""
        here: dict[int, Path | int] = dict(checkpoints_of(self._run))
        try:
            there = self._mirror.steps() if self._mirror is not None else []
        except CheckpointError as error:
            if not here:
                raise
            _say(f"{error}; continuing with what {self._run} has")
            there, self._mirror = [], None
        if asked == "none":
            if there:
                raise CheckpointError(
                    f"checkpoint.mirror {self._config.checkpoint.mirror}: has checkpoints of a run, the newest of step "
                    f"{there[-1]}; go on with it by --resume auto, or choose another folder"
                )
            return []
        return [each for _, each in sorted({**{step: step for step in there}, **here}.items())]

    def _abandon_in_mirror(self, step: int) -> None:
        if self._mirror is None:
            return
        for there in self._mirror.steps():
            if there > step or (self.elsewhere and there != step):
                self._mirror.abandon(there)
                _say(f"checkpoint.mirror: step {there} set aside, the run resumes from step {step}")

    def _choose(self) -> Path | None:
        while self._candidates:
            each = self._candidates.pop()
            try:
                if isinstance(each, int):
                    assert self._mirror is not None
                    _say(f"step {each}: fetched from checkpoint.mirror, since {self._run} does not have it")
                    each = self._mirror.fetch(each, self._run)
                return self._look_at(each)
            except DamagedCheckpoint as error:
                self._refuse(error)
        if self._refused:
            raise DamagedCheckpoint(
                f"run {self._run}: none of its {len(self._refused)} checkpoints is good, the last one tried: "
                f"{self._refused[-1]}; name another by --resume PATH, or start a new run under another run.name"
            )
        return None

    def _only(self, source: Path) -> Path:
        try:
            return self._look_at(find_checkpoint(source))
        except DamagedCheckpoint as error:
            raise _with_remedy(error) from None

    def _look_at(self, folder: Path) -> Path:
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
        state = TrainState.from_json(manifest.state, str(folder))
        DataState.from_json(state.position, f"checkpoint {folder}")
        check_fits(state, self._config, source=str(folder), **self._fingerprints)
        return folder

    def _is_elsewhere(self) -> bool:
        if self._next is None or self._auto:
            return False
        return self._next.resolve() not in [folder.resolve() for _, folder in checkpoints_of(self._run)]

    def _refuse(self, error: CheckpointError) -> None:
        self._refused.append(str(error))
        _say(f"{error}{'; taking the one before' if self._candidates else ''}")


def checkpoints_before(run: Path, step: int, margin: int) -> list[Path]:
    """Return the checkpoints of a run from before ``step``, the preferred one last.

    The newest one at least ``margin`` steps earlier is preferred, then the older ones, then those within the margin.
    """
    found = [(saved, folder) for saved, folder in checkpoints_of(run) if saved < step]
    return [folder for _, folder in sorted(found, key=lambda each: (each[0] < step - margin, each[0]))]


def _with_remedy(error: DamagedCheckpoint) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{error}; name another one, or take the run's newest good one by --resume auto")


def _say(text: str) -> None:
    say(text)
