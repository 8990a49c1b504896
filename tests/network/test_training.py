"""Training over several hosts whose links are cut and slowed in the middle of a step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.network.conftest import STEPS, supervised
from tests.network.hosts import Network
from tests.training import ROOT, audit, largest_difference, metrics, train

CLOSE = 2e-5  # sums over two ranks in another order, in fp32


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, Any]]:
    """What one process gives."""
    return train(folder, "alone", 1)


def same(run: Path, alone: list[dict[str, Any]]) -> None:
    """Each step once with the numbers of ``alone``, and each sample once."""
    difference, where = largest_difference(alone, metrics(run))
    assert difference < CLOSE, where
    assert audit(run) == audit(run.parent / "alone")


def test_two_hosts_started_as_torchrun_does_train_as_one_process_does(
    two: Network, folder: Path, alone: list[dict[str, Any]]
) -> None:
    place = {"MASTER_ADDR": two.hosts[0].address, "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    env = os.environ | place | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    command = [sys.executable, "-m", "megamoe", "train", "config.yaml", "--resume", "none", "run.name=torchrun"]
    ranks = [
        host.start(command, env | {"RANK": str(rank), "LOCAL_RANK": "0"}, cwd=folder, stderr=subprocess.PIPE)
        for rank, host in enumerate(two.hosts)
    ]
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    same(folder / "runs/torchrun", alone)


def test_a_slowed_link_makes_the_run_slower_and_nothing_else(
    two: Network, folder: Path, alone: list[dict[str, Any]]
) -> None:
    with supervised(two.hosts, folder, "slowed", "launch.health.check=full") as run:
        run.until(lambda: run.steps() >= 2)
        before, slow = two.sent_to(two.hosts[1]), run.steps() + 1
        two.limit(two.hosts[1], megabits=10)
        status, said = run.end()
        bytes_per_step = (two.sent_to(two.hosts[1]) - before) / (STEPS - slow + 1)
    assert status == 0, said
    same(run.folder, alone)
    assert [each["detail"]["kind"] for each in run.events("attempt")] == ["start"]
    # The step under way was slow only in part.
    fastest = min(row["step_seconds"] for row in metrics(run.folder) if row["step"] > slow)
    assert fastest > 0.5 * bytes_per_step * 8 / 10e6, f"{fastest} s for {bytes_per_step} bytes: not slowed"
    (measured,) = run.events("measured")
    assert measured["detail"]["nodes"] == ["n1", "n2"] and measured["detail"]["all_reduce_gbit"] > 0.1


def test_a_link_cut_in_the_middle_of_a_step_becomes_a_restart_by_the_watchdog(
    two: Network, folder: Path, alone: list[dict[str, Any]]
) -> None:
    with supervised(two.hosts, folder, "cut") as run:
        run.until(lambda: run.steps() >= 4)
        two.cut(two.hosts[1])
        logs = [run.folder / f"logs/attempt-1/rank-0000{rank}.log" for rank in range(2)]
        run.until(lambda: all("hangs in step" in log.read_text() for log in logs))
        two.restore(two.hosts[1])
        status, said = run.end()
    assert status == 0, said
    same(run.folder, alone)
    assert [each["detail"]["kind"] for each in run.events("attempt")] == ["start", "hang"]
    assert run.events("lost") == []
    (failed,) = run.events("failed")
    assert failed["detail"]["how"] == "ended with status 76"


def test_a_host_that_is_cut_off_for_longer_is_lost_and_taken_back(
    two: Network, folder: Path, alone: list[dict[str, Any]]
) -> None:
    patience = ["launch.node_timeout=6", "launch.node_wait=120", "train.watchdog_seconds=0"]
    with supervised(two.hosts, folder, "lost", *patience) as run:
        run.until(lambda: run.steps() >= 4)
        two.cut(two.hosts[1])
        run.until(lambda: run.events("lost"))
        two.restore(two.hosts[1])
        status, said = run.end()
    assert status == 0, said
    same(run.folder, alone)
    assert [each["detail"]["kind"] for each in run.events("attempt")] == ["start", "back"]
    (lost,) = run.events("lost")
    assert lost["node"] == "n2" and "no sign of life for 6 s" in lost["detail"]["why"]
