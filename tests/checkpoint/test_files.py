"""Files and folders of checkpoints: checksums of what is read, and publication without a moment without a good one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamoe.checkpoint import folders, tensorfile
from megamoe.checkpoint.folders import abandon, checkpoints_of, incomplete_path, publish, tidy, to_delete
from megamoe.checkpoint.tensorfile import FileSum, TensorFile, write_tensors
from megamoe.core.errors import DamagedCheckpoint

BLOCK = 4096


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "BLOCK", BLOCK)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"one": 5000, "two": 1, "three": 9001, "four": 300}
    return {f"{name}@0": torch.randn(size) for name, size in sizes.items()} | {
        "rng@0": torch.randint(0, 256, (777,), dtype=torch.uint8)
    }


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    sums = write_tensors(tmp_path / "file", tensors)
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert sums.size == (tmp_path / "file").stat().st_size and len(sums.blocks) == -(-sums.size // BLOCK) > 10


def test_any_range_reads_back(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    sums = write_tensors(tmp_path / "file", tensors)
    with TensorFile(tmp_path / "file", sums) as file:
        for key, tensor in tensors.items():
            for first, count in ((0, len(tensor)), (len(tensor) // 3, len(tensor) // 2), (len(tensor) - 1, 1)):
                into = torch.empty(count, dtype=tensor.dtype)
                file.read(key, first, into)
                assert torch.equal(into, tensor[first : first + count])
        assert sum(file.check_blocks()) == sums.size


def test_a_flipped_bit_anywhere_is_found_by_whoever_reads_there_only(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "file"
    sums = write_tensors(path, tensors)
    good = path.read_bytes()
    for at in (0, 9, 5000, len(good) // 2, len(good) - 1):
        spoilt = bytearray(good)
        spoilt[at] ^= 0x10
        path.write_bytes(spoilt)
        with pytest.raises(DamagedCheckpoint, match="checksum"), TensorFile(path, sums) as file:
            for _ in file.check_blocks():
                pass
    with TensorFile(path, sums) as file:  # the last byte is spoilt, in rng
        file.read("one@0", 0, torch.empty(5000))
        with pytest.raises(DamagedCheckpoint, match=r"bytes \d+ to \d+ do not have the checksum"):
            file.read("rng@0", 776, torch.empty(1, dtype=torch.uint8))


@pytest.mark.parametrize("size", [0, 3, 100, 20000])
def test_a_cut_or_missing_file_is_named(size: int, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "file"
    sums = write_tensors(path, tensors)
    os.truncate(path, size)
    with pytest.raises(DamagedCheckpoint, match=f"file: has {size} bytes, not {sums.size}"):
        TensorFile(path, sums)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match="file is missing"):
        TensorFile(path, sums)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x11" + b"\0" * 7 + b'{"a":{"dtype":"F3'],
    ids=["empty", "longer than the file", "no object", "cut"],
)
def test_a_file_with_right_sums_and_a_wrong_header_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    sums = FileSum(len(content), tuple(tensorfile.block_sum(content) for _ in range(bool(content))))
    with pytest.raises(DamagedCheckpoint, match="header"):
        TensorFile(path, sums)


def test_replacing_a_checkpoint_never_leaves_a_moment_without_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before the first, second, ... rename or deletion; what a listing finds then is always whole."""

    class Killed(BaseException):
        pass

    for fatal in range(6):
        run = tmp_path / str(fatal)
        final = run / "checkpoints" / "step-00000005"
        for folder, content in ((final, "old"), (incomplete_path(final), "new")):
            folder.mkdir(parents=True)
            for name in ("manifest.json", "rank-00000.safetensors"):
                (folder / name).write_text(content)
        count = 0

        def dying(real, fatal=fatal):  # type: ignore[no-untyped-def]
            def call(*arguments):  # type: ignore[no-untyped-def]
                nonlocal count
                count += 1
                if count > fatal:
                    raise Killed
                return real(*arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", dying(os.rename))
            patch.setattr(folders.shutil, "rmtree", dying(folders.shutil.rmtree))
            try:
                publish(final)
                assert fatal >= 4
            except Killed:
                assert fatal < 4
        for _ in range(2):  # as it was left, and after the next start has tidied up
            ((step, found),) = checkpoints_of(run)
            contents = {(found / name).read_text() for name in ("manifest.json", "rank-00000.safetensors")}
            assert step == 5 and contents in ({"old"}, {"new"}), fatal
            tidy(run)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000005"]


def test_what_is_set_aside_twice_is_there_twice(tmp_path: Path) -> None:
    for _ in range(2):
        for step in (1, 2, 3):
            (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
        assert len(abandon(tmp_path, 1, newer_only=True)) == 2
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [
        ".abandoned-step-00000002", ".abandoned-step-00000002.2", ".abandoned-step-00000003",
        ".abandoned-step-00000003.2", "step-00000001",
    ]  # fmt: skip
    assert [step for step, _ in folders.abandoned_of(tmp_path)] == [2, 2, 3, 3]


def test_retention_keeps_the_last_and_every_nth() -> None:
    assert to_delete([5, 1, 2, 3, 4], keep=2, keep_every=0) == [1, 2, 3]
    assert to_delete([1, 2, 3, 4, 5, 6, 7], keep=1, keep_every=3) == [1, 2, 4, 5]
    assert to_delete([1, 2], keep=3, keep_every=0) == []


def test_retention_leaves_later_steps_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    folders.retain(tmp_path, newest=3, keep=2, keep_every=0)
    assert [step for step, _ in checkpoints_of(tmp_path)] == [2, 3, 9]
