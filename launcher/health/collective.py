"""A short test of the network between the nodes of a run: ``python -m launcher.health.collective SECONDS SLOW BANDWIDTH``.

Runs as one process per node, or per GPU, with the variables that torchrun sets. A few megabytes are summed over all, and
sent to and fro between pairs of nodes. Rank 0 writes what was measured to stdout, as one line of JSON
(:class:`launcher.health.links.Links`). The arguments are launch.health.{seconds,slow,bandwidth}.

Exit status: 0 done; 1 it could not be done together; 2 this process cannot even begin (no torch, a GPU that fails).
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from launcher.health.links import Links, slow_links
from megamoe.config.launch import HealthConfig
from megamoe.core.child import end_with_parent

if TYPE_CHECKING:
    import torch

CANNOT = 2
ROUNDS = 7  # other nodes that each node is measured with
MOST_PAIRS = 2000  # a thousand nodes are measured with four others each
SIZES = {"cpu": 2 << 20, "cuda": 64 << 20}  # bytes; some milliseconds on a sound link, 4 s at a hundredth of 1 Gbit/s
TRIES = 5  # the best counts: other work on a node or in the network only makes a try slower
ENOUGH = 0.2  # seconds of measuring after which another try would tell nothing new


def main() -> None:
    """Run the test and write the report."""
    end_with_parent(lambda: os.read(0, 1))  # not through sys.stdin, whose lock would be held at exit
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True)  # where it hangs is in the log then
    limits = HealthConfig(seconds=float(sys.argv[1]), slow=float(sys.argv[2]), bandwidth=float(sys.argv[3]))
    try:
        device = _device()
    except Exception as error:
        print(f"cannot begin: {error}", file=sys.stderr)
        raise SystemExit(CANNOT) from error
    links = _measure(device, rank, world, world // int(os.environ["LOCAL_WORLD_SIZE"]), limits)
    if rank == 0:
        print(json.dumps(links.to_json()), flush=True)
    sys.stderr.flush()
    os._exit(0)  # no orderly exit: gloo's threads could abort the process during it, and its node would be blamed


def partners(nodes: int, rounds: int) -> list[list[tuple[int, int]]]:
    """Pair the nodes, round by round: each node once per round, and never the same pair twice."""
    ring: list[int | None] = [*range(nodes), *([None] if nodes % 2 else [])]
    found = []
    for _ in range(min(rounds, len(ring) - 1)):
        pairs = zip(ring[: len(ring) // 2], reversed(ring[len(ring) // 2 :]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def _device() -> torch.device:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    return device


def _measure(device: torch.device, rank: int, world: int, nodes: int, limits: HealthConfig) -> Links:
    import torch
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=limits.seconds))
    data = torch.zeros(SIZES[device.type] // 4, device=device)
    spent = torch.zeros(1, device=device)
    table = torch.zeros(nodes, nodes, device=device)

    def measure(pair: tuple[int, int]) -> None:
        one, other = (node * (world // nodes) for node in pair)
        if rank in (one, other):
            there_and_back = partial(_there_and_back, sender=one, receiver=other)
            best = _best(lambda: there_and_back(data), lambda: there_and_back(spent), spent)
            table[pair] = max(float(table[pair]), 2 * data.nbytes / best)

    def speeds() -> list[tuple[int, int, float]]:
        dist.all_reduce(table, dist.ReduceOp.MAX)
        return [(one, other, float(round(float(table[one, other])))) for pairs in rounds for one, other in pairs]

    together = _best(lambda: dist.all_reduce(data), lambda: dist.all_reduce(spent, dist.ReduceOp.MAX), spent)
    rounds = partners(nodes, min(ROUNDS, 2 * MOST_PAIRS // nodes))
    for pairs in rounds:
        for pair in pairs:
            measure(pair)
        dist.barrier()
    # Measure links that look slow once more, one after the other, with nobody else on the network.
    for one, other, _ in slow_links(speeds(), limits):
        measure((one, other))
        dist.barrier()
    found = speeds()
    dist.destroy_process_group()
    return Links([], [], 2 * (world - 1) / world * data.nbytes / together, found)


def _there_and_back(data: torch.Tensor, sender: int, receiver: int) -> None:
    import torch.distributed as dist

    first = dist.get_rank() == sender
    for sends in (first, not first):
        if sends:
            dist.send(data, receiver if first else sender)
        else:
            dist.recv(data, receiver if first else sender)


def _best(work: Callable[[], None], share: Callable[[], None], spent: torch.Tensor) -> float:
    """Return the fewest seconds of several tries of ``work``.

    Args:
        work: what all that take part do together.
        share: gives all of them one number in ``spent``, so that they do as many tries.
        spent: one number.
    """
    import torch

    times: list[float] = []
    spent.zero_()
    share()  # connects
    while len(times) < TRIES and float(spent) < ENOUGH:
        start = time.perf_counter()
        work()
        if spent.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        spent.fill_(sum(times))
        share()
    return min(times)


if __name__ == "__main__":
    main()
