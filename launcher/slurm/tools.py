"""Call SLURM's commands, bounded in time; a refusal becomes one line with what SLURM said."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

from megamoe.core.errors import UserError

TIMEOUT = 60.0  # seconds; a controller that is busy starting thousands of jobs has taken that long
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # which cluster, and who we are


def slurm(command: Sequence[str], stdin: str = "", environment: Mapping[str, str] | None = None) -> str:
    """Run a command of SLURM and return what it printed.

    Raises:
        UserError: it is not installed here, does not answer, or refuses.
    """
    tool = command[0]
    try:
        done = subprocess.run(
            command, input=stdin, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except FileNotFoundError:
        raise UserError(f"{tool}: not found; run this where SLURM's commands are, on a login node") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{tool}: SLURM has not answered for {TIMEOUT:.0f} s; try again later") from None
    if done.returncode:
        raise UserError(f"{tool}: {_said(done.stderr) or f'ended with status {done.returncode} without a word'}")
    return done.stdout


def outside_job(options: Sequence[str] = ()) -> dict[str, str]:
    """Return the environment for ``sbatch``, also from within a job.

    SLURM's variables of this job would be taken for wishes about the next one, and variables such as SBATCH_PARTITION
    win over a script; so those that name one of ``options`` (such as ``--partition=gpu``) go.
    """
    ours = {option.removeprefix("--").split("=")[0] for option in options}
    kept = dict(os.environ)
    for name in os.environ:
        of_this_job = name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name not in _KEPT
        if of_this_job or (name.startswith("SBATCH_") and _option(name) in ours):
            del kept[name]
    return kept


def expand(nodes: str) -> list[str]:
    """Return the names in a node list such as ``n[1-3]``."""
    return slurm(["scontrol", "show", "hostnames", nodes]).split() if nodes else []


def records(text: str) -> list[dict[str, str]]:
    """Parse what ``scontrol --oneliner show`` prints: a line of ``Key=Value`` pairs per record."""
    return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in text.splitlines() if line.strip()]


def _option(variable: str) -> str:
    name = variable.removeprefix("SBATCH_").lower().replace("_", "-")
    return {"timelimit": "time", "mem-per-node": "mem", "gpus-per-node": "gres"}.get(name, name)


def _said(stderr: str) -> str:
    """Join SLURM's lines into one, without the prefix of each."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines))
