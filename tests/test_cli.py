"""The command line: exit statuses, one-line errors, a quick --help, ranks and launcher. Real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = """
run: {name: tiny}
model:
  vision: {image_size: 32, patch_size: 16, width: 32, depth: 2, heads: 2, mlp_width: 64, expert_width: 32}
  decoder: {vocab_size: 300, width: 32, depth: 2, heads: 2, kv_heads: 1, head_dim: 16, expert_width: 32}
train: {steps: 10, global_batch: 4}
"""


def megamoe(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megamoe", *arguments],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
    )


def environment(**variables: str) -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**mine, "PYTHONPATH": str(ROOT), **variables}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


HEAVY = ("torch", "deepspeed", "webdataset", "numpy", "matplotlib", "transformers", "pyarrow", "pydantic")


def test_help_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from megamoe.cli import main\n"
        "try:\n    main(['--help'])\n"
        f"finally:\n    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr == "[]\n"


def test_help_names_every_verb(tmp_path: Path) -> None:
    answer = megamoe("--help", cwd=tmp_path)
    assert answer.returncode == 0
    for verb in ("train", "eval", "generate", "report", "plan", "checkpoint", "launch", "bench", "demo", "data"):
        assert f"  {verb} " in answer.stdout


@pytest.mark.parametrize(
    "verb", ["train", "eval", "generate", "report", "plan", "checkpoint", "launch", "bench", "demo", "data"]
)
def test_every_verb_has_help(verb: str, tmp_path: Path) -> None:
    answer = megamoe(verb, "--help", cwd=tmp_path)
    assert answer.returncode == 0 and "Usage: megamoe " + verb in answer.stdout


def test_version(tmp_path: Path) -> None:
    assert megamoe("--version", cwd=tmp_path).stdout == "megamoe 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "tiny.yaml", "train.stepz=3"], "train.steps"),
        (["train", "tiny.yaml", "train.steps"], "KEY=VALUE"),
        (["train", "tiny.yaml", "--nproc", "0"], "--nproc"),
        (["train", "tiny.yaml", "--nproc", "3", "parallel.pipeline=2"], "parallel.pipeline"),
        (["train", "tiny.yaml", "--resume", "no/such/step-00000010"], "--resume no/such/step-00000010"),
        (["plan", "tiny.yaml", "model.moe.top_k=99"], "top_k 99"),
        (["eval", "runs/tiny"], "runs/tiny"),
        (["report", "runs/nothing"], "metrics.jsonl"),
        (["data", "synth", "out"], "--samples"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(arguments: list[str], named: str, folder: Path) -> None:
    answer = megamoe(*arguments, cwd=folder)
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.startswith("megamoe: error: ") and answer.stderr.count("\n") == 1
    assert named in answer.stderr
    assert answer.stdout == ""
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.yaml"], "nothing was started or written"


def test_a_new_run_refuses_the_folder_of_an_old_one(folder: Path) -> None:
    run = folder / "runs/tiny"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    answer = megamoe("train", "tiny.yaml", cwd=folder)
    assert answer.returncode == 2 and "--resume auto" in answer.stderr and "run.name" in answer.stderr
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_nproc_that_contradicts_the_launcher_is_refused(folder: Path) -> None:
    answer = megamoe("train", "tiny.yaml", "--nproc", "2", cwd=folder, RANK="0", WORLD_SIZE="4")
    assert answer.returncode == 2 and "WORLD_SIZE=4" in answer.stderr


def test_the_traceback_of_a_rank_goes_where_its_launcher_wants_it(folder: Path) -> None:
    answer = megamoe("train", "tiny.yaml", cwd=folder, RANK="zero", WORLD_SIZE="1")
    assert answer.returncode == 1 and "Traceback" in answer.stderr and "'zero'" in answer.stderr
    answer = megamoe("train", "tiny.yaml", cwd=folder, RANK="zero", WORLD_SIZE="1", MEGAMOE_LOG="rank.log")
    assert answer.returncode == 1 and answer.stderr == ""
    assert "Traceback" in (folder / "rank.log").read_text()


def test_plan_shows_size_and_layout(folder: Path) -> None:
    answer = megamoe("plan", "tiny.yaml", "--nproc", "4", "parallel.pipeline=2", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    for label in ("parameters", "active parameters", "FLOPs per token", "4 ranks = pipeline 2 x data 2", "stage 1"):
        assert label in answer.stdout


def test_report_prints_the_path_of_the_page(folder: Path) -> None:
    run = folder / "runs/tiny"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "lm_loss": 2.0}) + "\n")
    answer = megamoe("report", "runs/tiny", cwd=folder)
    assert (answer.returncode, answer.stdout) == (0, "runs/tiny/report.html\n")
    assert (run / "report.html").exists()


def test_data_verbs_are_reached_through_megamoe_data(folder: Path) -> None:
    answer = megamoe("data", "synth", "out", "--samples", "3", "--seed", "0", "--validation", "1", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    assert (folder / "out/train/00000.tar").exists()


def test_ctrl_c_ends_with_130_and_one_short_line(folder: Path) -> None:
    os.mkfifo(folder / "fifo.yaml")  # reading the config waits for ever
    process = subprocess.Popen(
        [sys.executable, "-m", "megamoe", "plan", "fifo.yaml"],
        cwd=folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=10)
    assert process.returncode == 130
    assert error.strip() == "megamoe: interrupted"


def test_a_rank_that_is_done_ends_before_the_interpreter_is_taken_down(tmp_path: Path) -> None:
    program = """
import atexit
from megamoe.cli import main
class Late:
    def __del__(self): print("taken down")
late = Late()
atexit.register(print, "exit handler")
main(["--version"])"""
    for ranks, expected in (({"RANK": "0", "WORLD_SIZE": "1"}, ["exit handler"]), ({}, ["exit handler", "taken down"])):
        command, variables = [sys.executable, "-c", program], environment(**ranks)
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[1:] == expected
