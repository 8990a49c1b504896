"""`megamoe` with a fault: the gradient of one parameter on the last rank becomes NaN in certain computations of a step.

python poisoned.py COMPUTATIONS train ...      (COMPUTATIONS: 3 or 3,4: counted from 1, each try of a step counts)
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    from megamoe import cli
    from megamoe.parallel.deepspeed.engine import TrainEngine

    poisoned = {int(number) for number in sys.argv[1].split(",")}
    count = 0
    step = TrainEngine.step

    def faulty(self: TrainEngine, *arguments: object) -> object:
        nonlocal count
        count += 1
        handle = None
        if count in poisoned and int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]):
            parameter = next(iter(self.parameters.values()))
            handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
        try:
            return step(self, *arguments)
        finally:
            if handle is not None:
                handle.remove()

    TrainEngine.step = faulty
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()
