"""`megamoe` with a fault: from step 3 the GPU computes without end (a CPU: the process sleeps).

python -m benchmarks.gpu.hang train ...
"""

from __future__ import annotations

import sys
import time

import torch


def main() -> None:
    """Run ``megamoe`` with the fault."""
    from megamoe import cli
    from megamoe.parallel.deepspeed.engine import TrainEngine

    step, count = TrainEngine.step, 0

    def faulty(self: TrainEngine, *arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 3 and self.device.type == "cuda":
            torch.cuda._sleep(100 * 10**9)  # clock cycles, most of a minute
        elif count == 3:
            time.sleep(60)
        return step(self, *arguments)  # type: ignore[arg-type]

    TrainEngine.step = faulty  # type: ignore[assignment, method-assign]
    cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
