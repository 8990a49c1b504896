"""Where ranks stand: variables, interfaces, cores. The CPUs are made up."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from launcher.workers.placement import Place, environment, interface_of, numa_nodes, share_cores

TWO_SOCKETS = [list(range(0, 8)), list(range(8, 16))]


def test_ranks_get_cores_of_one_memory_each() -> None:
    assert share_cores(range(16), 4, TWO_SOCKETS) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert share_cores(range(16), 1, TWO_SOCKETS) == [list(range(16))]
    assert share_cores(range(16), 3, TWO_SOCKETS) == [[0, 1, 2, 3], [4, 5, 6, 7], list(range(8, 16))]


def test_only_the_cpus_that_the_job_may_use_are_shared() -> None:
    assert share_cores([2, 3, 9, 10], 2, TWO_SOCKETS) == [[2, 3], [9, 10]]
    assert share_cores([2, 3], 2, []) == [[2], [3]]
    assert share_cores([2], 2, TWO_SOCKETS) is None


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(1, 12), st.lists(st.sets(st.integers(0, 40)), max_size=5))
def test_shares_are_apart_and_nothing_is_left_out(cpus: set[int], ranks: int, numa: list[set[int]]) -> None:
    shares = share_cores(cpus, ranks, numa)
    if len(cpus) < ranks:
        assert shares is None
        return
    assert shares is not None and len(shares) == ranks and all(shares)
    assert sorted(cpu for share in shares for cpu in share) == sorted(cpus)


def test_hardware_threads_of_a_core_stay_together(tmp_path: Path) -> None:
    for node, cpus in enumerate(("0-1,4-5", "2-3,6-7")):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(cpus + "\n")
    for cpu in range(8):
        (tmp_path / f"cpu/cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu/cpu{cpu}/topology/core_id").write_text(f"{cpu % 4}\n")
    assert numa_nodes(tmp_path) == [[0, 4, 1, 5], [2, 6, 3, 7]]
    assert share_cores(range(8), 4, numa_nodes(tmp_path)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert numa_nodes(tmp_path / "nowhere") == []


def test_what_a_user_has_set_wins_where_there_is_a_choice() -> None:
    place = Place(first=4, ranks=2, world=6, node=2, master="10.0.0.1", port=2345, address="127.0.0.1")
    env = environment({"OMP_NUM_THREADS": "3", "NCCL_SOCKET_IFNAME": "ib0", "RANK": "77"}, place, 1, cores=8)
    assert (env["OMP_NUM_THREADS"], env["NCCL_SOCKET_IFNAME"]) == ("3", "ib0")
    assert (env["RANK"], env["LOCAL_RANK"], env["NODE_RANK"]) == ("5", "1", "2")
    assert env["GLOO_SOCKET_IFNAME"] == interface_of("127.0.0.1") and "CUDA_VISIBLE_DEVICES" not in env
    assert interface_of("203.0.113.7") is None
