"""`megamoe` with a fault: after a step, one bit of one parameter of a rank is another one.

python flipped.py RANK,STEP,dense|expert train ...
"""

from __future__ import annotations

import os
import sys

import torch


def main() -> None:
    from megamoe import cli
    from megamoe.model.parameter import info_of
    from megamoe.parallel.engine import TrainEngine

    rank, at, kind = sys.argv[1].split(",")
    count = 0
    step = TrainEngine.step

    def faulty(self: TrainEngine, *arguments: object) -> object:
        nonlocal count
        count += 1
        result = step(self, *arguments)
        if count == int(at) and os.environ["RANK"] == rank:
            parameter = next(p for p in self.parameters.values() if info_of(p).is_expert == (kind == "expert"))
            parameter.data.view(torch.int32).view(-1)[5] ^= 1
        return result

    TrainEngine.step = faulty
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()
