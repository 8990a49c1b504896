"""What srun and mpirun set, as they set it, becomes what torchrun would have set."""

from __future__ import annotations

import pytest

from launcher.workers.environment import first_host, rank_environment
from megamoe.core.errors import UserError

# As seen in SLURM 22.05: task 5 of `srun -N2 -n7` in an allocation of three nodes.
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_STEP_NODELIST": "n[2-3]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-host-1@1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


def test_a_task_of_srun_is_a_rank() -> None:
    places = rank_environment(STEP)
    assert 15000 <= int(places.pop("MASTER_PORT")) < 30000
    assert places == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "n2"}


def test_all_tasks_meet_at_one_port_and_other_steps_at_another() -> None:
    port = rank_environment(STEP)["MASTER_PORT"]
    assert rank_environment(STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})["MASTER_PORT"] == port
    assert rank_environment(STEP | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != port
    assert rank_environment(STEP | {"SLURM_JOB_ID": "4712"})["MASTER_PORT"] != port


def test_what_is_set_already_wins() -> None:
    places = rank_environment(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert (places["MASTER_ADDR"], places["MASTER_PORT"]) == ("10.0.0.1", "29500")
    assert rank_environment(STEP | {"RANK": "0", "WORLD_SIZE": "1"}) == {}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # A batch script: its allocation has many tasks, it is none of them.
        {name: value for name, value in STEP.items() if "STEP" not in name} | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        # `srun --pty bash`, or the shell of salloc where a site runs it as a step
        STEP | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        HYDRA | {"PMI_SIZE": "1"},
    ],
)
def test_where_ranks_are_started_from_is_no_rank(variables: dict[str, str]) -> None:
    assert rank_environment(variables) == {}


@pytest.mark.parametrize("variables", [OPEN_MPI, HYDRA])
def test_a_process_of_mpirun_is_a_rank(variables: dict[str, str]) -> None:
    places = rank_environment(variables)
    assert places["WORLD_SIZE"] == places["LOCAL_WORLD_SIZE"] == "4"
    assert places["RANK"] == places["LOCAL_RANK"] == ("3" if variables is OPEN_MPI else "1")
    assert places["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("variables", [OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, HYDRA | {"MPI_LOCALNRANKS": "2"}])
def test_mpi_over_hosts_needs_to_know_that_of_rank_0(variables: dict[str, str]) -> None:
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        rank_environment(variables)
    assert rank_environment(variables | {"MASTER_ADDR": "head"})["MASTER_ADDR"] == "head"
    inside = {"SLURM_JOB_ID": "8", "SLURM_JOB_NODELIST": "gpu[07-09]"}
    assert rank_environment(variables | inside)["MASTER_ADDR"] == "gpu07"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-3,7]", "n1"),
        ("gpu[007,009-010]", "gpu007"),
        ("rack[2-3]node[01-04]", "rack2node01"),
        ("a[1,3]-ib,b2", "a1-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
