"""Check whether a node is fit for ranks; an agent does so before it offers its node to the supervisor.

What is wrong is a line that names node, what, measured, limit and remedy. Checks between nodes are in
:mod:`launcher.health.links`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.health.gpus import GIB, Finding, Query, gpu_findings, query
from megamoe.config.launch import LaunchConfig
from megamoe.config.schema import Config
from megamoe.model.size import model_size

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Problem:
    """Why a node is not to be used.

    Attributes:
        node: its name.
        what: was looked at.
        measured: what it was found to be.
        limit: what it should be, with the setting that says so.
        remedy: what to do.
    """

    node: str
    what: str
    measured: str
    limit: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.node}: {self.what}: {self.measured}, {self.limit}; {self.remedy}"


@dataclass(frozen=True)
class Readings:
    """Where the numbers come from; tests put others in their place.

    Attributes:
        memory: bytes of host memory that are left to this process.
        space: bytes that are left to this user in a folder.
        shared: folder of shared memory.
        temporary: folder for temporary files.
        gpus: asks nvidia-smi.
    """

    memory: Callable[[], int]
    space: Callable[[Path], int]
    shared: Path
    temporary: Path
    gpus: Query


def free_memory() -> int:
    """Return the bytes of memory that this process may still take, within the machine and its control groups."""
    return min([psutil.virtual_memory().available, *_group_memory(Path("/proc/self/cgroup").read_text(), CGROUPS)])


def real_readings() -> Readings:
    """Return the readings of this machine."""
    return Readings(
        memory=free_memory,
        space=lambda folder: shutil.disk_usage(folder).free,
        shared=Path("/dev/shm"),
        temporary=Path(tempfile.gettempdir()),
        gpus=query,
    )


def node_problems(node: str, run_dir: Path, limits: LaunchConfig, readings: Readings | None = None) -> list[Problem]:
    """Find what speaks against using this node; takes some milliseconds, with GPUs a second or two.

    Args:
        node: its name.
        run_dir: the run's folder. How much room it has is no node's fault: see :func:`room_problem`.
        limits: of the run; with ``health.check=off`` nothing is looked at.
        readings: where the numbers come from; None: this machine.
    """
    if limits.health.check == "off":
        return []
    now, health = readings or real_readings(), limits.health
    ranks = limits.ranks_per_node or limits.gpus_per_node or 1
    findings = [
        *gpu_findings(limits, now.gpus),
        *_less(
            "free memory", now.memory, ranks * health.free_memory, "free_memory", "end what uses it, or take other nodes"
        ),
        *_space(now, now.shared, health.free_shared, "free_shared"),
        *_space(now, now.temporary, health.free_temporary, "free_temporary"),
        *_writable(run_dir),
    ]
    return [Problem(node, *finding) for finding in findings]


def clock_difference(theirs: float, sent: float, received: float) -> float:
    """Return the least seconds that another clock must be ahead of ours; negative: behind it.

    Args:
        theirs: its time, in seconds since the epoch, at some moment between the next two. A slow answer is no wrong clock.
        sent: ours when it was asked.
        received: ours when the answer was there.
    """
    return min(0.0, theirs - sent) + max(0.0, theirs - received)


def clock_problem(node: str, difference: float, limits: LaunchConfig) -> Problem | None:
    """Judge a :func:`clock_difference`; None when it is within the limit."""
    allowed = limits.health.clock
    if limits.health.check == "off" or not allowed or abs(difference) <= allowed:
        return None
    measured = f"{abs(difference):.1f} s {'behind' if difference < 0 else 'ahead of'} the supervisor's"
    return Problem(
        node, "clock", measured, f"at most {allowed:g} s (launch.health.clock)", "start its time service (chrony)"
    )


def room_problem(settings: Config, readings: Readings | None = None) -> str | None:
    """Say why the run's folder has no room for one more checkpoint. All nodes share it, so none is to blame."""
    if settings.launch.health.check == "off":
        return None
    optim, run_dir = settings.optim, settings.run.folder
    moments = 2 if optim.name == "adamw" else int(optim.momentum > 0)
    need = model_size(settings).parameters * 4 * (1 + moments)  # weights and moments in fp32
    free = (readings or real_readings()).space(run_dir)
    if free >= need:
        return None
    return (
        f"run.dir {run_dir}: {free / GIB:.2f} GiB free, a checkpoint needs {need / GIB:.2f} GiB; "
        f"make room or choose another run.dir"
    )


def _less(what: str, measure: Callable[[], int], gib: float, setting: str, remedy: str) -> list[Finding]:
    if not gib:
        return []
    limit = f"at least {gib:g} GiB (launch.health.{setting})"
    try:
        measured = measure()
    except OSError as error:
        return [(what, f"cannot be told ({error.strerror})", limit, "mount it")]
    return [] if measured >= gib * GIB else [(what, f"{measured / GIB:.2f} GiB", limit, remedy)]


def _space(now: Readings, folder: Path, gib: float, setting: str) -> list[Finding]:
    return _less(f"free space in {folder}", lambda: now.space(folder), gib, setting, "clean it up, or make it larger")


def _writable(run_dir: Path) -> list[Finding]:
    try:
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(b"whole")
    except OSError as error:
        limit = "has to be on a file system that all nodes share"
        return [
            (f"run.dir {run_dir}", f"cannot be written ({error.strerror})", limit, "mount it there, or look at its quota")
        ]
    return []


def _group_memory(groups: str, root: Path) -> list[int]:
    """Return the bytes that are left in each control group around a process.

    Args:
        groups: /proc/PID/cgroup.
        root: where control groups are mounted, version 2 or 1.
    """
    left = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, limit, used = (
            (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else (root, "memory.max", "memory.current")
        )
        folder = top / path.lstrip("/")
        for group in [folder, *folder.parents]:
            if (group / limit).exists() and (most := (group / limit).read_text().strip()) != "max":
                # The page cache of files counts as used, and is given up when memory is needed.
                stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                cache = int(stat.get("total_inactive_file" if controllers else "inactive_file", 0))
                left.append(max(0, int(most) - int((group / used).read_text()) + cache))
            if group == top:
                break
    return left
