"""megamoe launch on a real SLURM: what it trains is what one machine trains, however often it is stopped and started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import BedWithJobs
from tests.training import ROOT, audit, largest_difference, make_data, metrics, small_config, train, write_config

STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a config, and runs/local: the run on this machine that all others have to equal."""
    folder = tmp_path_factory.mktemp("launch")
    make_data(folder)
    config = small_config(train={"steps": STEPS}, checkpoint={"every": 5}, launch={"nodes": 2, "max_restarts": 3})
    write_config(folder, config)
    train(folder, "local", nproc=2)
    return folder


@pytest.fixture(autouse=True)
def environment(bed: BedWithJobs, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SLURM's commands work on the bed; jobs find this MegaMoE, also where templates call it by name."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "SRUN"))]:
        monkeypatch.delenv(name)
    for name, value in bed.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    by_name = folder / "bin/megamoe"  # the templates call it so; it may not be installed here
    by_name.parent.mkdir(exist_ok=True)
    by_name.write_text(f'#!/bin/bash\nexec {sys.executable} -m megamoe "$@"\n')
    by_name.chmod(0o755)
    monkeypatch.setenv("PATH", f"{by_name.parent}:{os.environ['PATH']}")
    yield


def launch(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megamoe", "launch", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done


def submit(folder: Path, name: str, *arguments: str) -> str:
    """Launch run ``name``; the id of its job."""
    done = launch(folder, "slurm", "config.yaml", f"run.name={name}", *arguments)
    return re.findall(r"submitted job (\d+)", done.stdout)[0]


def status(folder: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(launch(folder, "status", f"runs/{name}", "--json").stdout)
    return found


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


def wait_for_step(run: Path, step: int) -> None:
    path = run / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_text().count("\n") >= step, f"step {step} of {run}")


def assert_equal(folder: Path, name: str) -> None:
    """The run is done and the same as the one on this machine."""
    one, other = metrics(folder / "runs/local"), metrics(folder / "runs" / name)
    difference, where = largest_difference(one, other)
    assert difference < 1e-6, where
    assert audit(folder / "runs" / name) == audit(folder / "runs/local")


def said(folder: Path, name: str) -> str:
    return "".join(path.read_text() for path in sorted((folder / "runs" / name / "logs").glob("job-*.log")))


def test_two_nodes_train_what_one_machine_trains(bed: BedWithJobs, folder: Path) -> None:
    job = submit(folder, "two")
    assert bed.wait_job(job, timeout=120)["JobState"] == "COMPLETED", said(folder, "two")
    assert_equal(folder, "two")
    found = status(folder, "two")
    assert (found["step"], found["saved"], found["jobs"]) == (STEPS, STEPS, {})
    assert "n1, n2; 2 ranks" in said(folder, "two")
    for rank in (0, 1):
        assert (folder / f"runs/two/logs/attempt-1/rank-{rank:05d}.log").exists()
    assert f"step {STEPS}/{STEPS}" in launch(folder, "logs", "runs/two").stdout


def test_stop_saves_and_resume_goes_on(bed: BedWithJobs, folder: Path) -> None:
    job = submit(folder, "stopped")
    wait_for_step(folder / "runs/stopped", 2)
    assert f"job {job}: asked to save and end" in launch(folder, "stop", "runs/stopped").stdout
    facts = bed.wait_job(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "75:0", "0")
    reached = len(metrics(folder / "runs/stopped"))
    assert 2 <= reached < STEPS and status(folder, "stopped")["saved"] == reached
    refused = launch(folder, "slurm", "config.yaml", "run.name=stopped", check=False)
    assert refused.returncode == 2 and "megamoe launch resume runs/stopped" in refused.stderr
    again = re.findall(r"submitted job (\d+)", launch(folder, "resume", "runs/stopped").stdout)[0]
    assert bed.wait_job(again, timeout=120)["JobState"] == "COMPLETED", said(folder, "stopped")
    assert_equal(folder, "stopped")


def test_before_the_time_limit_it_saves_and_is_queued_again_without_bad_nodes(bed: BedWithJobs, folder: Path) -> None:
    job = submit(folder, "limited", "--exclude", "n4")
    wait_for_step(folder / "runs/limited", 2)
    # As after a check of n1 that failed.
    (folder / "runs/limited/launch/excluded.json").write_text('{"n1": "no GPU"}')
    bed.run("scancel", "--batch", "--signal=USR1", job)  # what SLURM does before the limit
    facts = bed.wait_job(job, timeout=180)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), said(folder, "limited")
    assert facts["NodeList"] == "n[2-3]" and set(facts["ExcNodeList"].split(",")) == {"n1", "n4"}
    assert_equal(folder, "limited")


def test_a_chain_goes_on_in_the_next_job_and_ends_with_the_run(bed: BedWithJobs, folder: Path) -> None:
    job = submit(folder, "chain", "launch.slurm.again=chain")
    wait_for_step(folder / "runs/chain", 2)
    found = status(folder, "chain")["jobs"]
    assert isinstance(found, dict) and {row["kind"] for row in found.values()} == {"run", "next"}
    successor = next(name for name, row in found.items() if row["kind"] == "next")
    bed.run("scancel", "--batch", "--signal=USR1", job)
    assert bed.wait_job(job)["JobState"] == "FAILED"
    assert bed.wait_job(successor, timeout=120)["JobState"] == "COMPLETED", said(folder, "chain")
    assert_equal(folder, "chain")
    assert bed.run("squeue", "--noheader").stdout == "", "nothing waits for a run that is done"


def test_a_spare_node_is_not_waited_for_and_a_range_is_filled(bed: BedWithJobs, folder: Path) -> None:
    busy = bed.submit("--nodes=1", "--exclusive", "--nodelist=n4", "--wrap=sleep 600")
    bed.wait_job(busy, "RUNNING")
    job = submit(folder, "spares", "--spares", "2")
    bed.wait_job(job, "RUNNING", "COMPLETED")
    assert bed.job(job)["NodeList"] == "n[1-3]"
    launch(folder, "stop", "--now", "runs/spares")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--partition", "gpu"],
            "launch.slurm.partition gpu: there is no such partition; this cluster has main, scavenge, short",
        ),
        (["--spares", "3"], "launch.nodes 2 + launch.spares 3: partition main gives a job 4 nodes at most"),
        (["--partition", "short", "--time", "10"], "launch.slurm.time 10: the limit of partition short is 00:02:00"),
        (["--constraint", "h100"], "launch.slurm.constraint"),
        (["--reservation", "mine"], "launch.slurm.reservation"),
        (["--exclude", "n9"], "launch.slurm.exclude"),
        (["--gpus-per-node", "1"], "launch.gpus_per_node"),
        (["launch.slurm.memory=900G"], "launch.slurm.memory"),
    ],
)
def test_what_slurm_would_not_run_is_one_line(arguments: list[str], line: str, bed: BedWithJobs, folder: Path) -> None:
    done = launch(folder, "slurm", "config.yaml", "run.name=wrong", *arguments, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and line in done.stderr, done.stderr
    assert not (folder / "runs/wrong").exists() and bed.run("squeue", "--noheader").stdout == ""


TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_slurm_takes_the_templates(template: Path, bed: BedWithJobs, folder: Path) -> None:
    # The bed has no GPUs.
    done = bed.run("sbatch", "--test-only", "--gres=none", template, "my.yaml", "run.name=mine")
    assert "to start at" in done.stderr


def test_tasks_of_srun_are_ranks(bed: BedWithJobs, folder: Path) -> None:
    """Of the template: each finds its place in the variables of its step, rank 0 on the first node."""
    options = ["--gres=none", "--nodes=2", "--ntasks-per-node=1", f"--chdir={folder}", f"--output={folder}/srun.log"]
    job = bed.submit(*options, ROOT / "slurm/multi-node.sbatch", "config.yaml", "run.name=srun")
    facts = bed.wait_job(job, timeout=120)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), (folder / "srun.log").read_text()
    assert_equal(folder, "srun")


def test_one_task_is_no_rank_but_a_place_to_start_ranks(bed: BedWithJobs, folder: Path) -> None:
    command = [sys.executable, "-m", "megamoe", "train", "config.yaml", "--nproc", "2", "run.name=shell"]
    done = bed.run("srun", "--nodes=1", "--ntasks=1", f"--chdir={folder}", *command, timeout=120)
    assert done.returncode == 0
    assert_equal(folder, "shell")
