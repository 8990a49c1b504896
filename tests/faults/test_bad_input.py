"""Bad input: one clear line that names the thing, a non-zero exit, no traceback, and the run's data untouched."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from megamoe.checkpoint.tensorfile import block_sum
from tests.training import ROOT, make_data, megamoe, metrics, small_config, train, write_config

SHARD = "shards/train/00000.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a config, and a run of 2 steps with a checkpoint."""
    path = tmp_path_factory.mktemp("bad-input")
    make_data(path, samples=140)
    write_config(path, small_config(train={"steps": 2}, checkpoint={"every": 1}))
    train(path, "base", 1)
    return path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(whole, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def _fails(folder: Path, *arguments: str, status: int = 2) -> str:
    done = megamoe("train", "config.yaml", "run.name=bad", *arguments, folder=folder, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_missing_shard_is_named(folder: Path) -> None:
    assert "shards/train/00002.tar: no such file" in _fails(folder, "data.train=shards/train/{00000..00007}.tar")


def test_a_glob_without_a_match_is_named(folder: Path) -> None:
    assert "nothing/*.tar" in _fails(folder, "data.train=nothing/*.tar")


def test_an_empty_tar_is_named(folder: Path) -> None:
    tarfile.open(folder / "shards/train/00001.tar", "w").close()
    assert "00001.tar" in _fails(folder)


def test_a_truncated_tar_is_named_with_the_place(folder: Path) -> None:
    path = folder / SHARD
    os.truncate(path, path.stat().st_size * 2 // 3 // 512 * 512)
    line = _fails(folder)
    assert "00000.tar" in line and "truncated" in line


def test_an_index_older_than_its_shard_is_refused(folder: Path) -> None:
    megamoe("data", "index", "shards/train", folder=folder)
    later = time.time() + 10
    os.utime(folder / SHARD, (later, later))
    line = _fails(folder)
    assert "00000.tar" in line and "older" in line and "megamoe data index" in line


def test_a_file_that_is_no_tokenizer_is_refused(folder: Path) -> None:
    (folder / "other.model").write_bytes(b"not a model")
    assert "other.model" in _fails(folder, "data.tokenizer=other.model")


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    line = _fails(folder, "model.decoder.vocab_size=100")
    assert "vocab_size" in line and "tokenizer" in line


def test_too_many_corrupt_pictures_stop_the_run_and_are_named(folder: Path) -> None:
    megamoe(
        "data", "synth", "spoilt", "--samples", "300", "--seed", "3", "--image-size", "32", "--corrupt", "0.5",
        "--validation", "0", folder=folder,
    )  # fmt: skip
    line = _fails(folder, "data.train=spoilt/train", "data.max_corrupt=0.01", "train.steps=40")
    assert "max_corrupt" in line
    lost = [json.loads(row) for row in (folder / "runs/bad/lost/rank-00000.jsonl").read_text().splitlines()]
    assert len(lost) > 10
    assert all(row["id"].startswith("00000.tar#") and row["reason"] for row in lost)


def test_an_impossible_layout_is_refused_before_any_process_starts(folder: Path) -> None:
    line = _fails(folder, "--nproc", "4", "parallel.pipeline=2", "parallel.zero=2")
    assert "parallel.zero" in line and "parallel.pipeline=1" in line
    assert not (folder / "runs/bad").exists()


def test_a_checkpoint_of_another_model_is_refused_with_the_first_difference(folder: Path) -> None:
    line = _fails(folder, "--resume", "runs/base", "model.decoder.width=64")
    assert "model.decoder.width is 48 there and 64 here" in line


def test_a_checkpoint_of_other_data_is_refused(folder: Path) -> None:
    assert "data.train" in _fails(folder, "--resume", "runs/base", "data.train=shards/validation")


def test_a_pickle_in_a_checkpoint_is_never_opened(folder: Path) -> None:
    checkpoint = folder / "runs/base/checkpoints/step-00000002"
    evidence = folder / "executed"
    payload = f"cposix\nsystem\n(S'touch {evidence}'\ntR.".encode()
    (checkpoint / ".metadata").write_bytes(payload)
    (checkpoint / "rank-00000.safetensors").write_bytes(payload)
    line = _fails(folder, "--resume", "runs/base")
    assert "damaged" in line
    assert not evidence.exists()


def test_a_manifest_cannot_lead_out_of_its_folder(folder: Path) -> None:
    manifest = folder / "runs/base/checkpoints/step-00000002/manifest.json"
    tree = json.loads(manifest.read_text())
    outside = folder / "outside.safetensors"
    shutil.copy(manifest.parent / "rank-00000.safetensors", outside)
    tree["files"]["../../../../outside.safetensors"] = tree["files"].pop("rank-00000.safetensors")
    del tree["checksum"]
    tree["checksum"] = block_sum(json.dumps(tree, separators=(",", ":")).encode())  # whoever forges it can count, too
    manifest.write_text(json.dumps(tree))
    assert "not the name of a checkpoint file" in _fails(folder, "--resume", "runs/base")


def test_a_loss_that_is_not_finite_stops_before_the_update(folder: Path) -> None:
    done = megamoe(
        "train", "config.yaml", "run.name=nan", "train.steps=9", "optim.lr=1e38", "optim.clip=0", "optim.warmup=0",
        folder=folder, check=False,
    )  # fmt: skip
    assert done.returncode not in (0, 2)
    rows = metrics(folder / "runs/nan")
    assert [row["skipped"] for row in rows] == [0, 1, 2, 3] and rows[-1]["loss"] is None, "three may be skipped, no more"
    assert "NonFiniteError: step 5" in (folder / "runs/nan/logs/attempt-1/rank-00000.log").read_text() + done.stderr


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_old_one(folder: Path) -> None:
    """A limit on the size of files stands in for a full disk: the kernel refuses the same write."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megamoe", "train", "config.yaml", "run.name=base", "--resume", "auto", "train.steps=3"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)),
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "cannot be written" in line and "free space" in line
    assert sorted(path.name for path in (folder / "runs/base/checkpoints").glob("step-*")) == [
        "step-00000001",
        "step-00000002",
    ]
