"""Turn the variables by which srun and mpirun tell a process its place into those of torchrun."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

from megamoe.core.errors import UserError

_FIRST_PORT, _PORTS = 15000, 15000  # below the ports that Linux gives to outgoing connections (32768 and above)


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of torchrun (RANK, WORLD_SIZE, ..., MASTER_PORT) that this process lacks.

    Understands steps of SLURM (``srun``, one task per rank), Open MPI and the launchers that speak PMI (MPICH, Intel
    MPI). Empty where torchrun has set all, and where there is no rank: a step of one task, as the shell of an
    allocation, and the batch script itself are places from which ranks are started.

    Raises:
        UserError: nothing says where rank 0 is.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {}
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        places = _of_slurm(environment)
    elif int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        places = _of_mpi(environment, "OMPI_COMM_WORLD_", "RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    elif int(environment.get("PMI_SIZE", 1)) > 1 and "MPI_LOCALRANKID" in environment:
        places = _of_mpi(environment, "", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    else:
        return {}
    return places | {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment}


def first_host(nodes: str) -> str:
    """Return the first name of a SLURM node list: ``n01`` of ``n[01-03,7],m1``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    # The step may have fewer nodes than the job.
    nodes = environment.get("SLURM_STEP_NODELIST", environment["SLURM_JOB_NODELIST"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": _tasks_of_node(environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_NODEID"])),
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": _port(f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"),
    }


def _of_mpi(
    environment: Mapping[str, str], prefix: str, rank: str, size: str, local_rank: str, local_size: str
) -> dict[str, str]:
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    places = {name: environment[prefix + variable] for name, variable in names.items()}
    if places["LOCAL_WORLD_SIZE"] == places["WORLD_SIZE"]:
        places["MASTER_ADDR"] = "127.0.0.1"
    elif "SLURM_JOB_NODELIST" in environment:
        places["MASTER_ADDR"] = first_host(environment["SLURM_JOB_NODELIST"])
    elif "MASTER_ADDR" not in environment:
        raise UserError(
            "MASTER_ADDR is not set, and MPI does not say on which host rank 0 is; hand it to all ranks (Open MPI: "
            "mpirun -x MASTER_ADDR=HOST, MPICH and Intel MPI: mpiexec -genv MASTER_ADDR HOST)"
        )
    job = environment.get("SLURM_JOB_ID", "")
    places["MASTER_PORT"] = _port(f"{job}.{environment.get('PMIX_NAMESPACE', '')}")  # the latter is of Open MPI
    return places


def _tasks_of_node(tasks: str, node: int) -> str:
    """Return the tasks of node number ``node`` in a list such as ``2(x3),1``."""
    counts: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [count] * int(times or 1)
    return counts[node]


def _port(launch: str) -> str:
    """Return a port that all ranks of a launch agree on, and that another launch on the same node avoids."""
    return str(_FIRST_PORT + zlib.crc32(launch.encode()) % _PORTS)
