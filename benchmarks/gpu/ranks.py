"""Parity of several ranks that share the one GPU, their messages through host memory (see ``staged.py``).

python -m benchmarks.gpu.ranks FILE LAYOUT STEPS      one of the ranks, started by the part
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.gpu.context import ROOT, Context
from benchmarks.gpu.parity import EXPECTED, FP32, STEPS, demo, differences, train
from benchmarks.gpu.staged import stage_collectives

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "pipeline 2 x expert 2": (4, ("parallel.pipeline=2", "parallel.expert=2")),
    "expert 2": (2, ("parallel.expert=2",)),
    "pipeline 2": (2, ("parallel.pipeline=2",)),
    "expert 2, ZeRO-3": (2, ("parallel.expert=2", "parallel.zero=3")),
}


def measure(context: Context) -> None:
    """Record for each layout how far the steps in fp32 are from the CPU's."""
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    holds = True
    for number, (layout, (ranks, _)) in enumerate(list(LAYOUTS.items())[: 1 if context.tiny else None]):
        path = context.scratch / f"{number}.json"
        started = time.perf_counter()
        failure = _run(context, layout, ranks, path)
        figures: dict[str, object] = {"seconds": time.perf_counter() - started}
        if failure is None:
            found = differences(json.loads(path.read_text(encoding="utf-8")), expected)
            figures |= found | {"holds": max(found.values()) <= FP32}
        else:
            figures |= {"failed": failure, "holds": False}
        holds = holds and bool(figures["holds"])
        context.record(layout, figures)
    context.record("holds", holds)


def _run(context: Context, layout: str, ranks: int, path: Path) -> str | None:
    """Start the ranks and wait for them. Returns the end of what a rank that failed has said; None: none has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.ranks", str(path), layout, str(3 if context.tiny else STEPS)],
            cwd=ROOT,
            # All take GPU 0: to each it is the only one of its machine.
            env=context.environment(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", MASTER_PORT=port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        while True:
            statuses = [process.poll() for process in processes]
            failed = [process for process, status in zip(processes, statuses, strict=True) if status]
            if failed or all(status == 0 for status in statuses):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    said = [process.communicate()[0] for process in processes]
    return said[processes.index(failed[0])][-1500:] if failed else None


def main() -> None:
    """Be one rank."""
    path, layout, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # On a CPU there is nothing to stage; there it is done all the same, so that the way is tried.
    cuda = torch.cuda.is_available()
    stage_collectives(lambda tensor: tensor.is_cuda or not cuda)

    from megamoe.parallel.deepspeed.process_group import joined_world

    with joined_world() as device:
        rows = train(demo(*LAYOUTS[layout][1]), device, steps)
        if os.environ["RANK"] == "0":
            path.write_text(json.dumps(rows), encoding="utf-8")
        dist.barrier()


if __name__ == "__main__":
    main()
