"""Find what is wrong with a job before it is submitted; each fault is one line with its remedy."""

from __future__ import annotations

import contextlib
import getpass
import shutil
from collections.abc import Sequence

from launcher.slurm import durations
from launcher.slurm.tools import outside_job, records, slurm
from megamoe.config.launch import LaunchConfig
from megamoe.core.errors import UserError

# What SLURM says, and the settings that it means.
_ABOUT = {
    "feature specification": " (launch.slurm.constraint)",
    "reservation": " (launch.slurm.reservation)",
    "Invalid node name": " (launch.slurm.exclude)",
    "generic resource": " (launch.gpus_per_node; `sinfo -o '%P %G'` shows what each partition has)",
    "node configuration is not available": " (launch.slurm.cpus_per_node, launch.slurm.memory, launch.gpus_per_node or "
    "launch.slurm.exclude leave too few nodes; `sinfo -o '%P %D %c %m %G'` shows what there is)",
    "qos": " (launch.slurm.qos)",
    "account": " (launch.slurm.account)",
    "unrecognized option": " (launch.slurm.extra)",
}


def check_settings(launch: LaunchConfig) -> None:
    """Refuse settings that contradict each other; needs no SLURM.

    Raises:
        UserError: they do.
    """
    if launch.slurm.signal_seconds <= launch.stop_grace:
        raise UserError(
            f"launch.slurm.signal_seconds {launch.slurm.signal_seconds}: the run needs up to launch.stop_grace "
            f"{launch.stop_grace:g} s to save before the time limit; use at least {launch.stop_grace * 2:g}"
        )
    limit = durations.seconds(launch.slurm.time) if launch.slurm.time is not None else float("inf")
    # SLURM looks at limits now and then, and may send the signal a minute early.
    if limit <= launch.slurm.signal_seconds + 60:
        raise UserError(
            f"launch.slurm.time {launch.slurm.time}: the run is told to save launch.slurm.signal_seconds "
            f"{launch.slurm.signal_seconds} s before the limit, or up to a minute earlier, which leaves no time to train; "
            "give more"
        )
    for option in launch.slurm.extra:
        if not option.startswith("-"):
            raise UserError(f"launch.slurm.extra {option!r}: no option of sbatch; write it as --name=value")


def check_cluster(launch: LaunchConfig, script: str, options: Sequence[str]) -> None:
    """Ask the cluster whether it would take the job; nothing is submitted.

    Raises:
        UserError: there is no SLURM here, or it would not.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; run this on a login node of a SLURM cluster, or use megamoe train --nproc N")
    _check_partition(launch)
    _check_account(launch.slurm.account)
    try:
        slurm(["sbatch", "--test-only"], script, outside_job(options))
    except UserError as error:
        about = next((keys for words, keys in _ABOUT.items() if words in str(error)), "")
        raise UserError(f"SLURM would not take the job: {error}{about}") from error


def _check_partition(launch: LaunchConfig) -> None:
    known = {record["PartitionName"]: record for record in records(slurm(["scontrol", "--oneliner", "show", "partition"]))}
    there = f"this cluster has {', '.join(sorted(known))}"
    asked = launch.slurm.partition
    if asked is None:
        chosen = [name for name, record in known.items() if record["Default"] == "YES"]
        if not chosen:
            raise UserError(f"launch.slurm.partition is not set, and the site has no default; {there}")
    else:
        chosen = asked.split(",")
    for name in chosen:
        if name not in known:
            raise UserError(f"launch.slurm.partition {name}: there is no such partition; {there}")
    _check_size(launch, {name: known[name] for name in chosen})


def _check_size(launch: LaunchConfig, chosen: dict[str, dict[str, str]]) -> None:
    names = ", ".join(chosen)
    most = max(min(float(record["TotalNodes"]), _number(record["MaxNodes"])) for record in chosen.values())
    wanted = launch.nodes + launch.spares
    if wanted > most:
        spares = f" + launch.spares {launch.spares}" if launch.spares else ""
        raise UserError(f"launch.nodes {launch.nodes}{spares}: partition {names} gives a job {most:g} nodes at most")
    limit = max((record["MaxTime"] for record in chosen.values()), key=durations.seconds)
    if launch.slurm.time is not None and durations.seconds(launch.slurm.time) > durations.seconds(limit):
        raise UserError(
            f"launch.slurm.time {launch.slurm.time}: the limit of partition {names} is {limit}; give no more, the run goes "
            f"on in the next job"
        )


def _check_account(account: str | None) -> None:
    if account is None:
        return
    mine: set[str] = set()
    user = getpass.getuser()
    # Sites without accounting have no sacctmgr, or one that does not answer; then sbatch itself will tell.
    with contextlib.suppress(UserError):
        rows = slurm(["sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user}", "format=account"])
        mine = set(rows.split())
    if mine and account not in mine:
        raise UserError(
            f"launch.slurm.account {account}: {user} cannot charge it; your accounts: {', '.join(sorted(mine))}"
        )


def _number(text: str) -> float:
    return float("inf") if text == "UNLIMITED" else float(text)
