"""SlurmCluster and SLURM's answers, which stand-ins give: what it asks for, and that it asks no more than once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.slurm import slurm_cluster as module
from launcher.slurm.request import exclude_node, note_job, noted_jobs
from launcher.slurm.slurm_cluster import SlurmCluster, orphaned
from megamoe.config.schema import Config
from tests.launcher.test_launch import calls, stand_in

QUEUE = """#!/bin/bash
echo "squeue $*" >> {folder}/calls.log
case "$*" in
    *%i*) /bin/cat {folder}/queue ;;
    *%L*) echo 1:30:00 ;;
    *) echo 'n[1-2]' ;;
esac
"""
SCONTROL = """#!/bin/bash
[[ $* == *hostnames* ]] || echo "scontrol $*" >> {folder}/calls.log
case "$*" in
    *hostnames*n\\[1-2\\]*) printf 'n1\\nn2\\n' ;;
    *hostnames*) echo "$3" ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder; job 7 has n1 and n2, and the agents of both are there."""
    (tmp_path / "bin").mkdir()
    for name, text in (("squeue", QUEUE), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text.format(folder=tmp_path))
        (tmp_path / "bin" / name).chmod(0o755)
    for name, answer in (("sbatch", "8\n"), ("scancel", ""), ("srun", ""), ("sinfo", "n1 mix\nn2 mix\n")):
        stand_in(tmp_path, name, answer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    (tmp_path / "launch").mkdir()
    queue(tmp_path)
    return tmp_path


def queue(folder: Path, *rows: str) -> None:
    (folder / "queue").write_text("".join(f"{row}\n" for row in rows))


def settings(again: str = "requeue", **launch: Any) -> Config:
    return Config.model_validate({"launch": {"nodes": 2, "slurm": {"again": again}, **launch}})


def cluster(folder: Path, *said: list[str], again: str = "requeue", **launch: Any) -> SlurmCluster:
    mine = SlurmCluster(settings(again, **launch).launch, "tiny", folder, "7", said[0].append if said else print)
    mine.nodes_present(["n1", "n2"])
    return mine


def asked(folder: Path, *tools: str) -> list[str]:
    """The calls since the last time."""
    found = [call for call in calls(folder) if call.split()[0] in tools]
    (folder / "calls.log").unlink(missing_ok=True)
    return found


def start_and_end_agents(mine: SlurmCluster) -> None:
    mine.start_agents()
    for agents in mine._agents:
        agents.wait()


@pytest.fixture
def sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_an_agent_starts_on_each_node_but_the_excluded(folder: Path) -> None:
    exclude_node(folder, "n1", "bad")
    mine = cluster(folder)
    assert mine.start_agents() == 1
    mine.close()
    (call,) = asked(folder, "srun")
    assert "--nodelist=n2" in call and "--nodes=1" in call and call.endswith(f"launch agent {folder}")


def test_one_helper_job_is_asked_for_and_follows_the_wish(folder: Path) -> None:
    mine = cluster(folder)
    mine.ask_for_nodes(2)
    assert asked(folder, "sbatch", "scontrol", "scancel") == ["sbatch --parsable"]
    script = (folder / "launch/helper.sh").read_text()
    assert "#SBATCH --nodes=1-2\n" in script and "#SBATCH --exclude=n1,n2\n" in script and "#SBATCH --time=90\n" in script
    assert noted_jobs(folder) == {"8": "helper"}

    queue(folder, "8|PENDING|")
    mine.ask_for_nodes(3)
    assert asked(folder, "sbatch", "scontrol", "scancel") == ["scontrol update JobId=8 NumNodes=1-3 ExcNodeList=n1,n2"]
    mine.ask_for_nodes(0)
    assert asked(folder, "sbatch", "scontrol", "scancel") == ["scancel --quiet 8"]


def test_nodes_that_are_on_their_way_are_not_asked_for_again(folder: Path) -> None:
    mine = cluster(folder)
    note_job(folder, "8", "helper")
    queue(folder, "8|RUNNING|n3")
    mine.ask_for_nodes(1)
    assert asked(folder, "sbatch") == []
    mine.ask_for_nodes(2)
    assert asked(folder, "sbatch") == ["sbatch --parsable"]
    assert "#SBATCH --nodes=1\n" in (folder / "launch/helper.sh").read_text()
    mine.nodes_present(["n1", "n2", "n3"])
    queue(folder, "8|RUNNING|n3")
    mine.ask_for_nodes(1)
    assert asked(folder, "sbatch") == ["sbatch --parsable"], "n3 is there: the wish is for another one"


def test_an_agent_that_ended_on_a_living_node_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGENT_SECONDS", 0.0)
    mine = cluster(folder)
    start_and_end_agents(mine)
    asked(folder)
    mine.nodes_present(["n1"])
    mine.ask_for_nodes(1)
    mine.close()
    found = asked(folder, "srun", "sbatch")
    assert len(found) == 1 and "--nodelist=n2" in found[0]


def test_a_node_that_does_not_answer_gets_no_agent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGENT_SECONDS", 0.0)
    stand_in(folder, "sinfo", "n2 mix*\n")
    mine = cluster(folder)
    start_and_end_agents(mine)
    asked(folder)
    mine.nodes_present(["n1"])
    mine.ask_for_nodes(1)
    mine.close()
    assert asked(folder, "srun", "sbatch") == ["sbatch --parsable"]


def test_a_refusal_is_said_once_and_not_repeated_at_once(folder: Path) -> None:
    said: list[str] = []
    stand_in(folder, "sbatch", "", said="sbatch: error: QOSMaxSubmitJobPerUserLimit\n", status=1)
    mine = cluster(folder, said)
    mine.ask_for_nodes(1)
    mine.ask_for_nodes(1)
    assert said == ["no further nodes for now: sbatch: QOSMaxSubmitJobPerUserLimit"]
    assert len(asked(folder, "sbatch")) == 1


def test_requeue_takes_excluded_nodes_and_the_fewest_along(folder: Path, sigterm: None) -> None:
    mine = cluster(folder, min_nodes=1)
    mine.exclude("n9", "bad")
    note_job(folder, "8", "helper")
    assert mine.run_again("time limit")
    mine.close()
    assert asked(folder, "scontrol", "scancel") == [
        "scontrol requeue 7",
        "scontrol update JobId=7 NumNodes=1-2 ExcNodeList=n9",
        "scancel --quiet 8",
    ]
    os.kill(os.getpid(), signal.SIGTERM)  # which SLURM sends now: there is still work to do


def test_a_chain_keeps_its_next_job_only_if_the_run_goes_on_in_it(folder: Path) -> None:
    for goes_on in (True, False):
        asked(folder)
        mine = cluster(folder, again="chain")
        mine.start_agents()
        (call,) = asked(folder, "sbatch")
        assert "--dependency=afternotok:7 --kill-on-invalid-dep=yes" in call and call.endswith("launch/job.sh")
        mine.exclude("n9", "bad")
        assert asked(folder, "scontrol") == ["scontrol update JobId=8 ExcNodeList=n9"]
        if goes_on:
            assert mine.run_again("time limit")
        mine.close()
        assert asked(folder, "scancel") == ([] if goes_on else ["scancel --quiet 8"])


def test_never_means_never(folder: Path) -> None:
    assert not cluster(folder, again="never").run_again("time limit")
    assert asked(folder, "scontrol") == []


def test_jobs_that_a_dead_supervisor_left_are_cancelled(folder: Path) -> None:
    note_job(folder, "5", "helper")
    note_job(folder, "7", "run")
    mine = cluster(folder)
    mine.start_agents()
    mine.close()
    assert asked(folder, "scancel") == ["scancel --quiet 5"] and noted_jobs(folder) == {"7": "run"}


@pytest.mark.parametrize(
    ("again", "call"), [("requeue", "scontrol requeue 7"), ("chain", "scancel 7"), ("never", "scancel 7")]
)
def test_who_is_left_of_a_dead_supervisor_ends_its_job(again: str, call: str, folder: Path, sigterm: None) -> None:
    note_job(folder, "7", "run")
    orphaned(folder, settings(again).launch)
    assert asked(folder, "scontrol", "scancel") == [call]
