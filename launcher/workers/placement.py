"""Place a rank: its variables as torchrun sets them, its network interface, and its share of a node's cores."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import psutil

SYSTEM = Path("/sys/devices/system")

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Place:
    """The ranks of one node among all.

    Attributes:
        first: number of the node's first rank; the others follow.
        ranks: how many it has.
        world: ranks of all nodes.
        node: number of the node.
        master: address of the first node, at which rank 0 listens.
        port: port there.
        address: this node's own address in the same network.
    """

    first: int
    ranks: int
    world: int
    node: int
    master: str
    port: int
    address: str


def environment(base: Mapping[str, str], place: Place, local_rank: int, cores: int) -> dict[str, str]:
    """Return the variables of a rank with ``cores`` cores; what the user chose in ``base`` wins over defaults."""
    defaults = {
        # More threads than cores over all ranks make every one of them slower.
        "OMP_NUM_THREADS": str(max(1, cores)),
        # The traceback of a rank that hangs or crashes must be in its log before the process is gone.
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    if interface := interface_of(place.address):
        # gloo would look up the host name, which fails on laptops between networks, and is 127.0.1.1 on many hosts.
        defaults["GLOO_SOCKET_IFNAME"] = interface
        if place.ranks < place.world:
            defaults["NCCL_SOCKET_IFNAME"] = f"={interface}"  # exactly this one; eth1 alone would mean eth10, too
    places = {
        "RANK": place.first + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": place.world,
        "LOCAL_WORLD_SIZE": place.ranks,
        "NODE_RANK": place.node,
        "GROUP_RANK": place.node,
        "MASTER_ADDR": place.master,
        "MASTER_PORT": place.port,
    }
    return {**defaults, **base, **{name: str(value) for name, value in places.items()}}


def interface_of(address: str) -> str | None:
    """Return the network interface of this machine that holds ``address``; None when none does."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family == socket.AF_INET and each.address == address for each in addresses):
            return name
    return None


def own_addresses() -> tuple[list[str], list[str]]:
    """Return the IPv4 addresses of this machine: those that others may reach it by, and loopback."""
    found = [each.address for every in psutil.net_if_addrs().values() for each in every if each.family == socket.AF_INET]
    return [each for each in found if not each.startswith("127.")], [each for each in found if each.startswith("127.")]


def share_cores(cpus: Collection[int], ranks: int, numa: Sequence[Collection[int]]) -> list[list[int]] | None:
    """Share a node's CPUs among its ranks: disjoint, and next to one memory where possible.

    Ranks are spread over the NUMA nodes as the CPUs are. With fewer ranks than NUMA nodes, each rank gets some of these
    whole.

    Args:
        cpus: what this process may use.
        ranks: how many share it.
        numa: CPUs of each NUMA node; what is in none of them counts as one more.

    Returns:
        None when there are fewer CPUs than ranks: they are better left to the scheduler.
    """
    if len(cpus) < ranks:
        return None
    left = set(cpus)
    nodes = []
    for node in [*numa, cpus]:
        if mine := [cpu for cpu in node if cpu in left]:
            nodes.append(mine)
            left.difference_update(mine)
    if ranks < len(nodes):
        groups = _cut(nodes, ranks)
        return [sorted(cpu for node in group for cpu in node) for group in groups]
    # Each NUMA node has a rank; the next rank goes where a rank has the most CPUs.
    shares = [1] * len(nodes)
    for _ in range(ranks - len(nodes)):
        busiest = max(range(len(nodes)), key=lambda number: len(nodes[number]) / shares[number])
        shares[busiest] += 1
    return [sorted(part) for node, share in zip(nodes, shares, strict=True) for part in _cut(node, share)]


def numa_nodes(system: Path = SYSTEM) -> list[list[int]]:
    """Return the CPUs of each NUMA node, hardware threads of a core side by side; empty if the machine does not tell."""
    paths = sorted(system.glob("node/node[0-9]*/cpulist"), key=lambda path: int(path.parent.name[4:]))
    return [sorted(_cpu_list(path.read_text()), key=lambda cpu: (_core(system, cpu), cpu)) for path in paths]


def _core(system: Path, cpu: int) -> int:
    path = system / f"cpu/cpu{cpu}/topology/core_id"
    return int(path.read_text()) if path.exists() else cpu


def _cut(things: Sequence[Thing], parts: int) -> list[Sequence[Thing]]:
    bounds = [len(things) * part // parts for part in range(parts + 1)]
    return [things[start:end] for start, end in pairwise(bounds)]


def _cpu_list(text: str) -> list[int]:
    """Parse ``0-3,8`` into numbers."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus
