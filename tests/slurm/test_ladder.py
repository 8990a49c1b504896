"""The ladder of recovery on a real SLURM: whatever fails, the run ends as one that nothing happened to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.elastic.events import recoveries
from megamoe.core.exit_status import NO_PROGRESS
from tests.slurm.jobs import BedWithJobs
from tests.slurm.launched import PATIENCE, LaunchedRun
from tests.training import audit, largest_difference, make_data, metrics, small_config, train, write_config

STEPS = 40
Launch = Callable[..., LaunchedRun]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a config, and runs/undisturbed: two ranks on this machine."""
    folder = tmp_path_factory.mktemp("ladder")
    make_data(folder)
    launch = {"nodes": 2, "max_restarts": 3, "slurm": {"signal_seconds": 61}}
    write_config(folder, small_config(train={"steps": STEPS}, checkpoint={"every": 5}, launch=launch))
    train(folder, "undisturbed", nproc=2)
    return folder


@pytest.fixture
def launch(bed: BedWithJobs, folder: Path) -> Iterator[Launch]:
    """Launches a run on the bed; what it has said is shown if the test fails."""
    runs: list[LaunchedRun] = []

    def launch(name: str, *arguments: str, pace: float = 0.5) -> LaunchedRun:
        runs.append(LaunchedRun(bed, folder, name, *arguments, pace=pace))
        return runs[-1]

    yield launch
    for run in runs:
        print(run.said(), *recoveries(run.run), sep="\n")


def busy(bed: BedWithJobs, *nodes: str) -> None:
    """Somebody else's jobs on these nodes."""
    for node in nodes:
        options = ["--nodes=1", "--exclusive", f"--nodelist={node}", "--output=/dev/null"]
        bed.wait_job(bed.submit(*options, "--wrap=sleep 3600"), "RUNNING")


def assert_undisturbed(run: LaunchedRun, exact: bool = True) -> None:
    """Each step once, all numbers and the order of all samples as in the undisturbed run.

    ``exact``: bit for bit, which holds as long as the layout is the same.
    """
    undisturbed = run.folder / "runs/undisturbed"
    difference, where = largest_difference(metrics(undisturbed), metrics(run.run))
    assert difference <= (0 if exact else 1e-5), where
    assert audit(run.run) == audit(undisturbed)
    assert run.steps() == STEPS and run.bed.run("squeue", "--noheader", "--name=megamoe-" + run.run.name).stdout == ""


def test_a_spare_takes_the_place_of_a_lost_node_and_the_run_comes_back_after_a_requeue(
    bed: BedWithJobs, launch: Launch
) -> None:
    run = launch("spare", "--spares", "1", "--exclude", "n4")
    run.until_goes_on("start")
    run.until(lambda: bool(run.nodes("spare")), "a spare")
    lost = run.another()
    bed.kill_node(lost)
    run.until_goes_on("spare")
    assert lost not in run.nodes("working") and bed.job(run.job)["Restarts"] == "0"
    bed.run("scontrol", "requeue", run.job)
    run.until_goes_on("again")
    assert run.end()["Restarts"] == "1"
    assert_undisturbed(run)


def test_without_a_spare_it_shrinks_and_grows_when_the_node_returns(bed: BedWithJobs, launch: Launch) -> None:
    busy(bed, "n3", "n4")
    run = launch("shrink")
    run.until_goes_on("start")
    lost = run.another()
    bed.kill_node(lost)
    run.pace(2)
    run.until_goes_on("shrink")
    assert lost not in run.nodes("working") and len(run.nodes("working")) == 1
    bed.start_node(lost)
    run.until_goes_on("grow")
    assert sorted(run.nodes("working")) == ["n1", "n2"]
    assert run.end()["Restarts"] == "0"
    assert_undisturbed(run, exact=False)


def test_when_the_first_node_dies_the_others_have_the_run_started_again(bed: BedWithJobs, launch: Launch) -> None:
    run = launch("host")
    run.until_goes_on("start")
    head = run.head()
    bed.kill_node(head)
    run.until_goes_on("host")
    assert head not in run.nodes("working")
    assert run.end()["Restarts"] == "1"
    assert_undisturbed(run)


def test_two_runs_on_the_same_nodes_do_not_disturb_each_other(bed: BedWithJobs, launch: Launch) -> None:
    shared = ["--exclude", "n3,n4", "launch.slurm.cpus_per_node=4", "launch.slurm.memory=8G"]
    one, other = launch("one", *shared), launch("other", *shared)
    for run in (one, other):
        run.until_goes_on("start")
    assert sorted(one.nodes("working")) == sorted(other.nodes("working")) == ["n1", "n2"]
    bed.run("scancel", "--signal=USR1", one.job)  # reaches the tasks of steps only
    assert other.end()["Restarts"] == "0" and other.attempts() == ["start"]
    one.until_goes_on("again")
    assert one.end()["Restarts"] == "1"
    for run in (one, other):
        assert_undisturbed(run)


@pytest.mark.nightly
def test_it_saves_before_a_short_time_limit_and_finishes_in_later_jobs(bed: BedWithJobs, launch: Launch) -> None:
    short = ["--partition", "short", "--time", "2", "launch.stop_grace=20", "launch.slurm.signal_seconds=31"]
    run = launch("limit", *short, pace=2)
    run.until(lambda: "again" in run.attempts(), "the time limit")
    assert [event["detail"]["signal"] for event in run.events("stop")] == ["SIGUSR1"]
    facts = run.end()
    assert int(facts["Restarts"]) >= 1
    assert_undisturbed(run)


@pytest.mark.nightly
def test_it_saves_when_a_job_of_higher_priority_comes_and_goes_on_after_it(bed: BedWithJobs, launch: Launch) -> None:
    run = launch("preempted", "--partition", "scavenge")
    run.until_goes_on("start")
    important = bed.submit("--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 15")
    bed.wait_job(important, timeout=PATIENCE)
    run.until_goes_on("again")
    (stop,) = run.events("stop")
    (ended,) = [event for event in run.events("ended") if event["time"] > stop["time"]][:1]
    assert set(ended["detail"]["statuses"].values()) == {75}, "saved"
    assert run.end()["Restarts"] == "1"
    assert_undisturbed(run)


@pytest.mark.nightly
def test_with_too_few_nodes_the_run_waits_in_the_queue_until_there_are_enough(bed: BedWithJobs, launch: Launch) -> None:
    run = launch("few", "--min-nodes", "2", "--exclude", "n3,n4")
    run.until_goes_on("start")
    lost = run.another()
    bed.kill_node(lost)
    run.until(lambda: bool(run.events("again")), "too few nodes")
    bed.start_node(lost)
    run.until_goes_on("again")
    assert "only 1 nodes are left, and the run needs 2" in run.said()
    assert run.end()["Restarts"] == "1"
    assert_undisturbed(run)


@pytest.mark.nightly
def test_a_run_that_gets_nowhere_ends_for_good_and_says_why(bed: BedWithJobs, launch: Launch) -> None:
    run = launch("vain", "launch.max_restarts_without_progress=1", pace=3600)
    killed: list[int] = []

    def another_rank() -> bool:
        ranks = [rank for node in run.nodes("working") for rank in run.ranks_on(node) if rank not in killed]
        killed.extend(ranks[:1])
        return bool(ranks)

    for _ in range(2):
        run.until(another_rank, "a rank of a new attempt")
        attempts = len(run.attempts())
        os.kill(killed[-1], signal.SIGKILL)
        if attempts == 1:
            run.until(lambda: len(run.attempts()) == 2, "the restart")
    facts = bed.wait_job(run.job, timeout=PATIENCE)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", f"{NO_PROGRESS}:0", "0"), run.said()
    assert "no progress: a restart came no further than step 0" in run.said()
