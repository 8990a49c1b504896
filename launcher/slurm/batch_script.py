"""Write the batch scripts of a run, with a reason beside each option: its job, and helper jobs that bring further nodes."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from megamoe.config.launch import LaunchConfig, SlurmConfig
from megamoe.core.errors import UserError
from megamoe.core.run_folder import RunFolder

Options = list[tuple[str, list[str]]]  # pairs of a reason and the sbatch options that it explains


def job_options(launch: LaunchConfig, name: str, run_dir: Path, workdir: Path, excluded: Collection[str] = ()) -> Options:
    """Return the options of the job of run ``name``: where it may run, how many nodes, and how it is continued."""
    slurm = launch.slurm
    counted = f"{launch.nodes} node{'s' * (launch.nodes > 1)} at work"
    if launch.spares:
        counted += f", and up to {launch.spares} to stand by, for which it does not wait"
    again = {
        "requeue": ("SLURM starts this job again after preemption or the loss of its first node.", "--requeue"),
        "chain": (
            "Another job waits for the end of this one and goes on; it is submitted when this one starts.",
            "--no-requeue",
        ),
        "never": ("launch.slurm.again is never: when this job ends, the run stops.", "--no-requeue"),
    }[slurm.again]
    return [
        ("", [f"--job-name=megamoe-{name}", f"--chdir={workdir}"]),
        ("One log for all starts of this job, which are appended.", [_output(run_dir, "job"), "--open-mode=append"]),
        *_place(slurm, excluded),
        # Without --ntasks-per-node, with which SLURM never gives more than the fewest nodes of a range.
        (
            f"{counted}. Each gets one task, the agent, which starts its ranks.",
            [f"--nodes={node_range(launch)}"],
        ),
        *_node(launch),
        *_time(slurm),
        (
            f"{slurm.signal_seconds} s before the time limit the run saves. B: the signal goes to this script alone, which "
            "hands it on in order.",
            [f"--signal=B:USR1@{slurm.signal_seconds}"],
        ),
        (again[0], [again[1]]),
        ("The loss of a node does not end the job: the run goes on with the nodes that are left.", ["--no-kill"]),
        *_extra(slurm),
    ]


def node_range(launch: LaunchConfig, again: bool = False) -> str:
    """Return the nodes to ask for, as N or MIN-MAX.

    SLURM starts the job when MIN are free, with as many as it can give then. A first start waits for ``launch.nodes``;
    one ``again`` waits for no more than ``launch.min_nodes``, if that is set.
    """
    fewest = (launch.min_nodes if again else None) or launch.nodes
    most = launch.nodes + launch.spares
    return str(fewest) if fewest == most else f"{fewest}-{most}"


def helper_options(
    launch: LaunchConfig, name: str, run_dir: Path, workdir: Path, count: int, not_on: Collection[str], seconds: float
) -> Options:
    """Return the options of a job that brings up to ``count`` further nodes for the ``seconds`` left to the run's job."""
    slurm = launch.slurm
    minutes = f"{math.ceil(seconds / 60)}" if math.isfinite(seconds) else None
    return [
        ("", [f"--job-name=megamoe-{name}-helper", f"--chdir={workdir}"]),
        ("", [_output(run_dir, "helper"), "--open-mode=append"]),
        *_place(slurm, not_on),
        ("As many as are free at once.", [f"--nodes=1-{count}" if count > 1 else "--nodes=1"]),
        *_node(launch),
        *([("As long as the job that it helps.", [f"--time={minutes}"])] if minutes else []),
        ("The run asks for another one if it needs it.", ["--no-requeue", "--no-kill"]),
        *_extra(slurm),
    ]


def job_script(options: Options, slurm: SlurmConfig, name: str, run_dir: Path) -> str:
    """Return the script for ``sbatch`` that runs the supervisor in place of the shell."""
    head = [
        f"# The job of run {name}, written by `megamoe launch`; what it trains is in request.json beside it.",
        "# Submitted by hand, once it has run, it goes on from the newest checkpoint.",
    ]
    body = [
        "# A warning must not end a job whose supervisor is only just starting.",
        "trap '' USR1",
        "# exec: SLURM sends its signals to this process, so the supervisor has to be it. It starts an agent on each node.",
        "exec " + shlex.join([sys.executable, "-m", "megamoe", "launch", "supervise", str(run_dir)]),
    ]
    return _script(head, options, slurm.setup, body)


def helper_script(options: Options, slurm: SlurmConfig, name: str, run_dir: Path) -> str:
    """Return the script for ``sbatch`` that runs an agent on each of its nodes, until the run's job ends."""
    head = [f"# Further nodes for the job of run {name}, submitted by that job."]
    # All of them, since variables of the job would win over an option that is not given.
    size = '--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES"'
    srun, *arguments = agents_command(slurm, run_dir)
    body = [f"exec {srun} {size} {shlex.join(arguments)}"]
    return _script(head, options, slurm.setup, body)


def agents_command(slurm: SlurmConfig, run_dir: Path, nodes: Sequence[str] = ()) -> list[str]:
    """Return the ``srun`` command for an agent on each of ``nodes``, or on all nodes of the job."""
    srun = [
        "srun",
        "--overlap",  # beside an earlier step that a lost node keeps from ending
        "--no-kill",  # else the loss of a node ends the agents of all
        "--kill-on-bad-exit=0",
        "--wait=0",  # an agent that has ended does not end the others after a while
        "--ntasks-per-node=1",
        "--cpu-bind=none",  # the agent binds its ranks; on its own core they would all share that one
        "--input=none",
    ]
    if nodes:
        srun += [f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", f"--nodelist={','.join(nodes)}"]
    python = sys.executable
    if slurm.container is not None:
        workdir = Path.cwd()
        mounts = [f"{folder}:{folder}" for folder in dict.fromkeys([str(run_dir), str(workdir)])]
        srun += [f"--container-image={slurm.container}", f"--container-mounts={','.join(mounts + slurm.container_mounts)}"]
        srun += [f"--container-workdir={workdir}"]
        python = "python3"  # that of the image
    return [*srun, python, "-m", "megamoe", "launch", "agent", str(run_dir)]


def _place(slurm: SlurmConfig, excluded: Collection[str]) -> Options:
    names = ("partition", "account", "qos", "constraint", "reservation")
    given = [f"--{name}={value}" for name in names if (value := getattr(slurm, name)) is not None]
    not_on = ",".join(dict.fromkeys([*([slurm.exclude] if slurm.exclude else []), *excluded]))
    return [
        *([("Where it may run, and on whose account.", given)] if given else []),
        *([("Nodes never to use.", [f"--exclude={not_on}"])] if not_on else []),
    ]


def _node(launch: LaunchConfig) -> Options:
    slurm = launch.slurm
    rows: Options = []
    if slurm.cpus_per_node is None:
        rows.append(("Whole nodes: a neighbour would slow down one rank, and with it all.", ["--exclusive"]))
    else:
        rows.append(("CPUs of each node.", [f"--cpus-per-task={slurm.cpus_per_node}"]))
    rows.append(("0: all memory of each node." if slurm.memory is None else "", [f"--mem={slurm.memory or 0}"]))
    if launch.gpus_per_node:
        rows.append(("", [f"--gres=gpu:{launch.gpus_per_node}"]))
    return rows


def _time(slurm: SlurmConfig) -> Options:
    return [] if slurm.time is None else [("The limit of one job, not of the run.", [f"--time={slurm.time}"])]


def _extra(slurm: SlurmConfig) -> Options:
    return [("launch.slurm.extra", slurm.extra)] if slurm.extra else []


def _output(run_dir: Path, kind: str) -> str:
    path = str(RunFolder(run_dir).logs / kind)
    if "\\" in path or "\n" in path:
        raise UserError(
            f"run.dir {run_dir}: SLURM cannot write a log whose path has a backslash or a line break; rename it"
        )
    return f"--output={path.replace('%', '%%')}-%j.log"


def _script(head: Sequence[str], options: Options, setup: Sequence[str], body: Sequence[str]) -> str:
    lines = ["#!/bin/bash", *head]
    for reason, given in options:
        lines += ["", *([f"# {reason}"] if reason else [])]
        lines += [f"#SBATCH {_quoted(option)}" for option in given]
    if setup:
        lines += ["", "# launch.slurm.setup", *setup]
    return "\n".join([*lines, "", *body, ""])


def _quoted(option: str) -> str:
    """Quote an option as sbatch reads it: double quotes around blanks, backslashes before quotes."""
    if "\n" in option:
        raise UserError(f"{option.split('=')[0]}: a line break cannot stand in an option of sbatch")
    name, equals, value = option.partition("=")
    if not equals or not any(c in value for c in " \t'\"\\#$`"):
        return option
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{escaped}"'
