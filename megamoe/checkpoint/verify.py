"""Verify that a checkpoint is whole: every byte by checksum, every element of model and optimizer exactly once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megamoe.checkpoint.contents import Expected, expected_tensors
from megamoe.checkpoint.folders import checkpoint_step, checkpoints_of
from megamoe.checkpoint.manifest import MANIFEST, Manifest, StoredTensor, model_fingerprint, read_manifest
from megamoe.checkpoint.pieces import piece_key
from megamoe.checkpoint.store import WEIGHT
from megamoe.checkpoint.tensorfile import FileSum, TensorFile
from megamoe.checkpoint.train_state import TrainState
from megamoe.core.errors import CheckpointError, DamagedCheckpoint

_NAMED = 20  # problems listed one by one; the rest is only counted


@dataclass
class Verdict:
    """What a verification found.

    Attributes:
        folder: The checkpoint.
        problems: One line per problem; none if the checkpoint is whole.
        files: Files read.
        bytes: Bytes read and compared with their checksums.
        weights: Parameters of the model that are stored exactly once.
        moments: Optimizer moments that are stored exactly once.
        experts: Experts, over all sparse blocks, whose weights are all stored.
    """

    folder: Path
    problems: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    weights: int = 0
    moments: int = 0
    experts: int = 0


def to_verify(source: Path) -> tuple[list[Path], int]:
    """Return the checkpoints to verify (``source`` itself, or all complete ones of a run) and the bytes they claim.

    Raises:
        CheckpointError: it is neither a checkpoint nor a run with one.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; give a run or a checkpoint")
    folders = [folder for _, folder in checkpoints_of(source)]
    if (source / MANIFEST).is_file() or checkpoint_step(source) is not None:  # a checkpoint without its manifest is damaged
        folders = [source]
    if not folders:
        raise CheckpointError(f"{source}: neither a checkpoint nor a run with one")
    size = 0
    for folder in folders:
        with suppress(CheckpointError):  # verify_checkpoint reports it
            size += read_manifest(folder).size
    return folders, size


def verify_checkpoint(folder: Path, on_bytes: Callable[[int], None] = lambda count: None) -> Verdict:
    """Read all of a checkpoint and compare it with the model that its config describes.

    Args:
        folder: The checkpoint.
        on_bytes: Called with the number of bytes after each read.
    """
    verdict = Verdict(folder)
    try:
        manifest = read_manifest(folder)
        config = TrainState.from_json(manifest.state, str(folder)).parsed_config(str(folder))
    except CheckpointError as error:
        verdict.problems.append(str(error))
        return verdict
    held: dict[str, dict[str, tuple[int, str]]] = {name: {} for name in manifest.files}
    for tensor, stored in manifest.tensors.items():
        for start, count, name in stored.pieces:
            held[name][piece_key(tensor, start)] = (count, stored.dtype)
    for name, pieces in held.items():
        _check_file(folder / name, manifest.files[name], pieces, verdict, on_bytes)
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in {*manifest.files, MANIFEST})
    verdict.problems += [f"{folder / name}: is not in the manifest" for name in strangers]
    _check_coverage(manifest, expected_tensors(config.model, config.optim), verdict)
    if len(verdict.problems) > _NAMED:
        more = len(verdict.problems) - _NAMED
        verdict.problems[_NAMED:] = [f"{folder}: {more} more problems"]
    return verdict


def _check_file(
    path: Path, sums: FileSum, pieces: dict[str, tuple[int, str]], verdict: Verdict, on_bytes: Callable[[int], None]
) -> None:
    try:
        with TensorFile(path, sums) as file:
            for count in file.check_blocks():
                verdict.bytes += count
                on_bytes(count)
            found = {key: (entry.count, str(entry.dtype).removeprefix("torch.")) for key, entry in file.entries.items()}
    except DamagedCheckpoint as error:
        verdict.problems.append(str(error))
        return
    verdict.files += 1
    for key in sorted(pieces.keys() | found.keys()):
        if pieces.get(key) != found.get(key):
            verdict.problems.append(f"{path}: {key} is {found.get(key)} there and {pieces.get(key)} in the manifest")


def _check_coverage(manifest: Manifest, expected: dict[str, Expected], verdict: Verdict) -> None:
    sizes = {name.removeprefix(WEIGHT): tensor.size for name, tensor in expected.items() if name.startswith(WEIGHT)}
    if manifest.model != model_fingerprint(sizes):
        verdict.problems.append(f"{verdict.folder}: the weights' names and sizes are not those of its own config's model")
    for name, wanted in expected.items():
        stored = manifest.tensors.get(name)
        if stored is None:
            verdict.problems.append(f"{verdict.folder}: {name} is missing")
        elif stored.size != wanted.size or stored.dtype != "float32":
            verdict.problems.append(
                f"{verdict.folder}: {name} has {stored.size} x {stored.dtype}, not {wanted.size} x float32"
            )
        else:
            wrong = _not_once(stored, wanted)
            verdict.problems += [f"{verdict.folder}: {name}: {what}" for what in wrong]
            if not wrong and name.startswith(WEIGHT):
                verdict.weights += 1
            elif not wrong:
                verdict.moments += 1
    strangers = [n for n in manifest.tensors if n not in expected and not n.startswith("rng/")]
    verdict.problems += [f"{verdict.folder}: {name} is not of the model" for name in sorted(strangers)]
    verdict.experts = _whole_experts(manifest, expected)


def _not_once(stored: StoredTensor, wanted: Expected) -> list[str]:
    """Return the ranges that no piece, or more than one, stores."""
    wrong, end = [], 0
    for start, count, _ in (*stored.pieces, (wanted.size, 0, "")):
        if start > end:
            wrong.append(f"{_range(end, start, wanted)} missing")
        elif start < end:
            wrong.append(f"{_range(start, min(end, start + count) if count else end, wanted)} there twice or too many")
        end = max(end, start + count)
    return wrong


def _range(start: int, end: int, wanted: Expected) -> str:
    elements = f"elements {start} to {end}"
    if not wanted.experts:
        return f"{elements} are"
    each = wanted.size // wanted.experts
    first, last = start // each, min((end - 1) // each, wanted.experts - 1)
    experts = f"expert {first}" if first == last else f"experts {first} to {last}"
    return f"{elements} ({experts} of {wanted.experts}) are"


def _whole_experts(manifest: Manifest, expected: dict[str, Expected]) -> int:
    """Count the experts, over all sparse blocks, whose weights are all stored completely."""
    blocks: dict[str, list[set[int]]] = {}
    for name, wanted in expected.items():
        if wanted.experts and name.startswith(WEIGHT):
            stored = manifest.tensors.get(name)
            whole = _complete(stored.pieces if stored else (), wanted)
            blocks.setdefault(name.rpartition(".")[0], []).append(whole)
    return sum(len(set.intersection(*whole)) for whole in blocks.values())


def _complete(pieces: Sequence[tuple[int, int, str]], wanted: Expected) -> set[int]:
    each = wanted.size // wanted.experts
    held = [0] * wanted.experts
    end = 0
    for start, count, _ in pieces:
        position, stop = max(start, end), min(start + count, wanted.size)
        while position < stop:
            part = min(stop, (position // each + 1) * each) - position
            held[position // each] += part
            position += part
        end = max(end, stop)
    return {expert for expert, elements in enumerate(held) if elements == each}
