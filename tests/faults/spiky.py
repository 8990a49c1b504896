"""`megamoe` with a fault: the loss on the last rank is 50 times what it is in certain steps.

python spiky.py STEPS train ...

STEPS: for example 9/1,10,!12: in the first try of step 9, in all tries of step 10; all ranks are killed when step 12 comes
after the run has gone back once.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    from megamoe import cli
    from megamoe.parallel.deepspeed.engine import TrainEngine
    from megamoe.train.trainer import Trainer

    spec = sys.argv[1].split(",")
    compute, step = Trainer._compute, TrainEngine.step
    now, tries = 0, 0

    def counted(self: Trainer, *arguments: object) -> object:
        nonlocal now, tries
        now, tries = self.step + 1, 0
        if self.state.guard.rollbacks and f"!{now}" in spec:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(self, *arguments)

    def faulty(self: TrainEngine, micro_batches: object, targets: float, *arguments: object) -> object:
        nonlocal tries
        tries += 1
        last = int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"])
        if last and (str(now) in spec or f"{now}/{tries}" in spec):
            targets /= 50
        return step(self, micro_batches, targets, *arguments)

    Trainer._compute, TrainEngine.step = counted, faulty
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()
