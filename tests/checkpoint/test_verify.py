"""`megamoe checkpoint ls | verify | prune` on checkpoints of a small model, written here piece by piece."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from megamoe.checkpoint.contents import expected_tensors, expected_weights
from megamoe.checkpoint.manifest import Manifest, StoredTensor, model_fingerprint, read_manifest, write_manifest
from megamoe.checkpoint.tensorfile import write_tensors
from megamoe.checkpoint.train_state import TrainState
from megamoe.checkpoint.verify import verify_checkpoint
from megamoe.commands.checkpoint import checkpoint
from megamoe.config import Config, load_config
from megamoe.core.errors import CheckpointError, DamagedCheckpoint
from megamoe.metrics.counters import Counters
from megamoe.model.size import model_size
from tests.training import ROOT, small_config

EXPERTS = "weight/decoder.blocks.1.mlp.experts.gate_up"


def _config(**sections: Any) -> Config:
    return Config.model_validate(small_config(optim={"name": "adamw"}, **sections))


def _write(folder: Path, step: int) -> None:
    """A whole checkpoint in two files: the first holds the first half of each tensor, the second the rest."""
    config = _config()
    folder.mkdir(parents=True)
    stored, files = {}, ({}, {})
    for name, expected in expected_tensors(config.model, config.optim).items():
        half = expected.size // 2
        pieces = ((0, half, 0), (half, expected.size - half, 1))
        stored[name] = StoredTensor(
            expected.size, "float32", tuple((a, n, f"rank-{f:05d}.safetensors") for a, n, f in pieces)
        )
        for start, count, file in pieces:
            files[file][f"{name}@{start}"] = torch.randn(count)
    sums = {f"rank-{f:05d}.safetensors": write_tensors(folder / f"rank-{f:05d}.safetensors", files[f]) for f in (0, 1)}
    state = TrainState(
        counters=Counters(step=step, tokens=1, samples=1), position={},
        config=config.model_dump(mode="json"), tokenizer="t", data="d",
    ).to_json()  # fmt: skip
    model = model_fingerprint({name: each.size for name, each in expected_weights(config.model).items()})
    write_manifest(folder, Manifest("2026-01-02T03:04:05+00:00", "2 ranks", model, state, sums, stored))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10, 20, ..., 50."""
    for step in range(10, 60, 10):
        _write(tmp_path / f"checkpoints/step-{step:08d}", step)
    (tmp_path / "metrics.jsonl").write_text('{"step": 20, "loss": 1.25}\n')
    return tmp_path


def _call(*arguments: object) -> Result:
    return CliRunner().invoke(checkpoint, [str(argument) for argument in arguments], catch_exceptions=False)


def _forge(folder: Path, **tensors: StoredTensor | None) -> list[str]:
    """Problems after the manifest was changed, its checksum being right."""
    manifest = read_manifest(folder)
    changed = {name: tensor for name, tensor in {**manifest.tensors, **tensors}.items() if tensor is not None}
    write_manifest(folder, replace(manifest, tensors=changed))
    return verify_checkpoint(folder).problems


@pytest.mark.parametrize("name", ["1b", "demo"])
def test_what_is_expected_is_what_the_model_has(name: str) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml")
    weights = expected_weights(config.model)
    assert sum(each.size for each in weights.values()) == model_size(config).parameters
    assert sum(each.size for each in weights.values() if each.experts) == model_size(config).expert_parameters
    assert len(expected_tensors(config.model, config.optim)) == 3 * len(weights)


def test_a_whole_checkpoint_is_whole(run: Path) -> None:
    verdict = verify_checkpoint(run / "checkpoints/step-00000010")
    assert verdict.problems == [] and verdict.files == 2
    assert verdict.weights * 2 == verdict.moments > 100
    assert verdict.experts == 8 * 6  # two sparse blocks of the vision tower, four of the decoder


def test_a_missing_expert_is_named(run: Path) -> None:
    folder = run / "checkpoints/step-00000010"
    whole = read_manifest(folder).tensors[EXPERTS]
    each = whole.size // 8
    first = (0, 4 * each, whole.pieces[0][2])
    assert whole.pieces[0] == first
    problems = _forge(folder, **{EXPERTS: replace(whole, pieces=(first,))})
    assert any(f"{EXPERTS}: elements {4 * each} to {whole.size} (experts 4 to 7 of 8) are missing" in p for p in problems)
    assert verify_checkpoint(folder).experts == 8 * 6 - 4


def test_what_is_stored_twice_or_not_of_the_model_or_missing_is_named(run: Path) -> None:
    folder = run / "checkpoints/step-00000010"
    tensors = read_manifest(folder).tensors
    whole = tensors[EXPERTS]
    (start, count, file), second = whole.pieces
    problems = _forge(
        folder, **{EXPERTS: replace(whole, pieces=((start, count, file), (count - 5, second[1] + 5, second[2])))}
    )
    assert any("there twice" in p and "expert 3 of 8" in p for p in problems)
    problems = _forge(folder, **{EXPERTS: None, "weight/other": whole, "exp_avg/head.norm.weight": None})
    assert any(p.endswith(f"{EXPERTS} is missing") for p in problems)
    assert any(p.endswith("weight/other is not of the model") for p in problems)


def test_any_flipped_byte_of_a_manifest_is_damage(run: Path) -> None:
    path = run / "checkpoints/step-00000010/manifest.json"
    good = path.read_bytes()
    for at in [good.index(b'"format": 2') + 10, *range(0, len(good), len(good) // 50)]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(DamagedCheckpoint):
            read_manifest(path.parent)
    path.write_text(json.dumps(json.loads(good), indent=1))  # as an editor or a tool would leave it
    read_manifest(path.parent)


def test_a_checkpoint_of_another_version_is_no_damage(run: Path) -> None:
    path = run / "checkpoints/step-00000010/manifest.json"
    path.write_text('{"format": 1, "state": {}, "files": {}, "tensors": {}}')
    with pytest.raises(CheckpointError, match="has format 1, not 2") as caught:
        read_manifest(path.parent)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_verify_names_each_damaged_checkpoint_and_has_status_1(run: Path) -> None:
    assert _call("verify", run).exit_code == 0
    flipped = run / "checkpoints/step-00000020/rank-00001.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-3] ^= 1
    flipped.write_bytes(content)
    (run / "checkpoints/step-00000030/rank-00000.safetensors").unlink()
    (run / "checkpoints/step-00000040/more").touch()
    answer = _call("verify", run)
    assert answer.exit_code == 1
    assert answer.stdout.count(": whole: 2 files") == 2 and answer.stdout.count("NOT WHOLE") == 3
    for text in ("step-00000020/rank-00001.safetensors: bytes", "step-00000030/rank-00000.safetensors: file is missing"):
        assert text in answer.stderr
    assert "step-00000040/more: is not in the manifest" in answer.stderr
    (verdict,) = json.loads(_call("verify", run / "checkpoints/step-00000020", "--json").stdout)
    assert len(verdict["problems"]) == 1 and verdict["files"] == 1


def test_what_is_no_checkpoint_is_refused_and_one_without_a_manifest_is_not_whole(run: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run with one"):
        _call("verify", run / "checkpoints")
    (run / "checkpoints/step-00000010/manifest.json").unlink()
    answer = _call("verify", run / "checkpoints/step-00000010")
    assert answer.exit_code == 1 and "no readable manifest.json" in answer.stderr


def test_ls_shows_what_is_there(run: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000040").rename(checkpoints / ".incomplete-step-00000060")
    (checkpoints / "step-00000050").rename(checkpoints / ".abandoned-step-00000050")
    (checkpoints / "step-00000030/manifest.json").write_text("{")
    listed = json.loads(_call("ls", run, "--json").stdout)
    assert [(each["step"], each["status"]) for each in listed] == [
        (10, "complete"), (20, "complete"), (30, "damaged"), (50, "abandoned"), (60, "incomplete"),
    ]  # fmt: skip
    assert listed[1]["loss"] == 1.25 and listed[1]["layout"] == "2 ranks" and listed[1]["size"] > 1e6
    table = _call("ls", run).stdout.splitlines()
    assert table[2].split() == ["20", "2026-01-02", "03:04:05", *table[2].split()[3:5], "1.2500", "complete", "2", "ranks"]
    assert len(table) == 6 and "not valid JSON" in _call("ls", run).stderr


def test_prune_keeps_the_last_whole_ones_and_every_nth(run: Path) -> None:
    (run / "checkpoints/step-00000050/rank-00000.safetensors").unlink()
    dry = json.loads(_call("prune", run, "--keep", 1, "--every", 20, "--dry-run", "--json").stdout)
    steps = {what: [int(Path(folder).name[5:]) for folder in dry[what]] for what in ("deleted", "kept", "damaged")}
    assert steps == {"deleted": [10, 30], "kept": [20, 40], "damaged": [50]}
    assert len(list((run / "checkpoints").iterdir())) == 5
    answer = _call("prune", run, "--keep", 1, "--every", 20)
    assert "2 deleted" in answer.stdout and "2 stay" in answer.stdout and "left alone" in answer.stderr
    assert sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir()) == [20, 40, 50]
    (run / "checkpoints/step-00000020").rename(run / "checkpoints/.abandoned-step-00000020")
    _call("prune", run, "--keep", 1)
    assert (run / "checkpoints/.abandoned-step-00000020").exists()
    _call("prune", run, "--keep", 1, "--abandoned")
    assert not (run / "checkpoints/.abandoned-step-00000020").exists()
