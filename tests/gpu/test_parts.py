"""The check of a GPU, tried on the CPU with tiny sizes: on the day nothing but the device is to be new."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.batches import micro_batches, targets, tokens
from benchmarks.gpu.parity import EXPECTED, demo, differences, reference
from benchmarks.gpu.parts import PARTS
from tests.training import ROOT, megamoe


def check(*arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    megamoe("data", "synth", "drawn", "--samples", "96", "--seed", "1", "--level", "3", "--shard-size", "48",
            "--image-size", "64", "--validation", "32", folder=folder)  # fmt: skip
    megamoe("data", "tokenizer", "drawn/train", "tokenizer", "--vocab-size", "400", folder=folder)
    (folder / "drawn/train").rename(folder / "train")
    return folder


@pytest.fixture(scope="module")
def result(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All parts, in one call as on the day."""
    out = tmp_path_factory.mktemp("out")
    done = check("--out", str(out), "--data", str(data), "--device", "cpu", "--tiny")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (out / "page.md").read_text() in done.stdout
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_done_and_holds(part: str, result: dict[str, Any]) -> None:
    ended = result["parts"][part]
    assert ended["ended"] == "done" and ended["figures"], ended
    assert ended["figures"].get("holds", True), ended
    assert ended["seconds"] < PARTS[part].seconds


def test_what_was_measured_is_there_by_name(result: dict[str, Any]) -> None:
    figures = {name: part["figures"] for name, part in result["parts"].items()}
    step = figures["sweep"]["micro-batch 1, recompute none"]
    assert step["tokens_per_second"] > 0 and step["predicted_bytes"] > 0 and 0.5 < step["filled"] <= 1
    assert len(figures["profile"]["dearest kernels"]) == 20
    parts = figures["profile"]["seconds of each part"]
    assert {"decoder: experts", "decoder: router", "decoder: attention", "vision blocks", "head"} <= set(parts)
    assert parts["decoder blocks"]["backward"] > parts["decoder: experts"]["backward"] > 0
    assert figures["profile"]["waits of the host"]["aten::nonzero"] == 0
    assert figures["parity"]["fp32 again"]["bit for bit the first run"]
    assert figures["tars"]["data_share"] < 1 and len(figures["tars"]["steps"]["losses"]) == 9
    assert figures["checkpoint"]["bytes"] > 1e6 and figures["moves"]["CPU to device"]["tensors"] > 100


def test_what_the_cpu_computes_is_what_lies_in_the_repository() -> None:
    """Else it belongs to an older commit: python -m benchmarks.gpu.parity"""
    found = differences(reference(), json.loads(EXPECTED.read_text(encoding="utf-8")))
    assert max(found.values()) < 1e-5, found


def test_clipping_bites_in_the_run_that_is_compared() -> None:
    rows = json.loads(EXPECTED.read_text(encoding="utf-8"))
    assert all(row["grad_norm"] > 2 * demo().optim.clip for row in rows)
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"] - 0.3


def test_drawn_batches_are_packed_full_and_the_same_each_time() -> None:
    config = demo()
    one, other = (micro_batches(config, 2, 3, seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    positions = 6 * config.data.sequence_length
    assert 0.75 * positions < tokens(one) < positions and 0 < targets(one) < tokens(one)


def test_what_is_cut_off_keeps_what_it_has_and_the_rest_is_named(data: Path, tmp_path: Path) -> None:
    arguments = (
        "--out",
        str(tmp_path),
        "--data",
        str(data),
        "--device",
        "cpu",
        "--tiny",
        "--parts",
        "machine,parity,faults",
    )
    done = check(*arguments, "--seconds", "14")
    assert done.returncode == 1
    parts = json.loads((tmp_path / "result.json").read_text())["parts"]
    assert parts["machine"]["ended"] == "done"
    assert parts["parity"]["ended"].startswith("cut off") or parts["faults"]["ended"].startswith(("cut off", "not started"))
    assert "time was up" in done.stdout or "cut off" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--parts", "machine,nonsense"), "--parts: there is no part nonsense; there are machine, parity"),
        (("--device", "cuda"), "--device cuda: torch sees no GPU; use --device cpu --tiny"),
        (("--device", "cpu", "--data", "nowhere"), "--data nowhere: has no tokenizer.model; benchmarks/gpu/pack.sh makes"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = check("--out", str(tmp_path / "out"), *arguments)
    assert done.returncode == 2 and reason in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
