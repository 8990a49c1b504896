"""The test bed itself: it behaves as a cluster does, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.bed import Bed, BedError
from tests.slurm.jobs import BedWithJobs

TESTBED = Path(__file__).parents[2] / "slurm" / "testbed"
# Where SLURM and munge put their files unless told otherwise.
SYSTEM_FOLDERS = ["/run", "/var/lib/munge", "/var/lib/slurm", "/var/log", "/var/spool", "/dev/shm"]


def test_a_job_runs_on_three_nodes_with_names_of_their_own(bed: BedWithJobs, script: Path) -> None:
    script.write_text(
        "#!/bin/sh\nsrun sh -c 'echo $SLURM_PROCID $SLURMD_NODENAME $(hostname) $(getent hosts $(hostname))'\n"
    )
    output = script.with_name("output")
    job = bed.submit("--nodes=3", "--ntasks-per-node=1", f"--output={output}", script)
    assert bed.wait_job(job)["JobState"] == "COMPLETED"
    lines = sorted(output.read_text().splitlines())
    assert [line.split()[:3] for line in lines] == [[str(rank), f"n{rank + 1}", f"n{rank + 1}"] for rank in range(3)]
    assert len({line.split()[3] for line in lines}) == 3, "each node has its own address"


def test_a_killed_node_takes_all_its_processes_along_and_comes_back_idle(bed: BedWithJobs, script: Path) -> None:
    # One child stays in its session, one detaches as a daemon does; a node's death ends both.
    script.write_text("#!/bin/sh\nsrun --no-kill sh -c 'sleep 901 & setsid nohup sleep 902 & sleep 903'\n")
    job = bed.submit("--nodes=2", "--ntasks-per-node=1", "--no-kill", "--output=/dev/null", script)
    lost, kept = "n2", "n1"
    wait_until(lambda: all(sleeping(bed, node) == {"901", "902", "903"} for node in (lost, kept)))
    bed.kill_node(lost)
    assert not bed.processes(lost)
    assert sleeping(bed, kept) == {"901", "902", "903"}
    bed.wait_nodes(lambda states: states[lost].startswith("down"))
    facts = bed.job(job)
    assert (facts["JobState"], facts["NodeList"]) == ("RUNNING", kept)
    bed.start_node(lost)
    bed.wait_nodes(lambda states: states[lost] == "idle")


def test_a_requeued_job_runs_again_within_seconds(bed: BedWithJobs, script: Path) -> None:
    script.write_text('#!/bin/sh\n[ "$SLURM_RESTART_COUNT" ] || sleep 900\n')
    job = bed.submit("--requeue", "--output=/dev/null", script)
    bed.wait_job(job, "RUNNING")
    bed.run("scontrol", "requeue", job)
    assert bed.wait_job(job, timeout=30)["Restarts"] == "1"


def test_two_beds_side_by_side_and_nothing_of_one_stays(
    bed: BedWithJobs, tmp_path_factory: pytest.TempPathFactory, script: Path
) -> None:
    script.write_text("#!/bin/sh\nsetsid nohup sleep 904 &\nsleep 905\n")
    ours = bed.submit("--output=/dev/null", script)
    folder = tmp_path_factory.mktemp("bed") / "other"  # with the name of the test it is too long for sockets
    before = system_files()
    up = run_testbed("up", "--nodes", "2", "--folder", folder)
    assert up.stdout == f"export SLURM_CONF={folder}/slurm.conf\n"
    other = BedWithJobs(folder)
    other.wait_job(other.submit("--output=/dev/null", script), "RUNNING")
    wait_until(lambda: {"904", "905"} <= sleeping(other, "n1") | sleeping(other, "n2"))
    assert set(bed.states()) == {"n1", "n2", "n3", "n4"} and set(other.states()) == {"n1", "n2"}
    assert len(processes_that_name(folder)) > 6, "daemons, steps and children"
    run_testbed("down", "--folder", folder)
    assert not folder.exists()
    assert not processes_that_name(folder)
    assert system_files() == before
    assert bed.job(ours)["JobState"] == "RUNNING"
    run_testbed("down", "--folder", folder)  # again: nothing to do, no error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kill-node", "n9"], "there is no node n9; this bed has n1, n2, n3, n4"),
        (["start-node", "n1"], "n1 is running"),
        (["up"], "is not empty"),
    ],
)
def test_a_wrong_request_is_answered_in_one_line(bed: BedWithJobs, arguments: list[str], words: str) -> None:
    answer = run_testbed(*arguments, "--folder", bed.folder, status=2)
    assert words in answer.stderr and answer.stderr.count("\n") == 1


def test_a_folder_that_is_no_bed_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(BedError, match="no folder of a test bed"):
        Bed(tmp_path).down()
    assert (tmp_path / "precious").exists()


def test_missing_tools_are_named_with_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.bed.PATH", str(tmp_path))
    with pytest.raises(BedError, match=r"slurmctld.* not found; .* installs the packages slurm-wlm and munge"):
        Bed(tmp_path / "bed").up()
    assert not (tmp_path / "bed").exists()


def run_testbed(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, TESTBED, *arguments], capture_output=True, text=True, timeout=90)
    assert done.returncode == status, done.stderr
    return done


def sleeping(bed: Bed, node: str) -> set[str]:
    """The arguments of all `sleep` on a node."""
    commands = [read(f"/proc/{pid}/cmdline").split("\0") for pid in bed.processes(node)]
    return {command[1] for command in commands if command[0] == "sleep"}


def processes_that_name(folder: Path) -> list[str]:
    """Processes of the machine that have the folder in their command or environment, as all of a bed have."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        command = read(f"/proc/{pid}/cmdline")
        if str(folder) in command + read(f"/proc/{pid}/environ"):
            found.append(f"{pid} {command}")
    return found


def system_files() -> set[str]:
    """Files of SLURM and munge outside of any bed."""
    paths = [path for top in SYSTEM_FOLDERS for path in Path(top).glob("*")]
    paths += [
        inner
        for path in paths
        if path.is_dir() and ("slurm" in path.name or "munge" in path.name)
        for inner in path.rglob("*")
    ]
    return {str(path) for path in paths if "slurm" in str(path) or "munge" in str(path)}


def read(path: str) -> str:
    """A file of /proc; empty when its process has ended or is not ours to look at."""
    try:
        return Path(path).read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
