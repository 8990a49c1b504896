"""`megamoe` with a fault: in a step, one bit of one parameter of a rank becomes another one, or of what else it keeps.

python flipped.py RANK,STEP,dense|expert|main|moment|generator|position train ...
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch


def main() -> None:
    from megamoe import cli
    from megamoe.model.parameter import info_of
    from megamoe.parallel.deepspeed.engine import TrainEngine
    from megamoe.parallel.deepspeed.main_parameters import owned_pieces
    from megamoe.train.trainer import Trainer

    rank, at, kind = sys.argv[1].split(",")
    step, compute = TrainEngine.step, Trainer._compute

    def before_update(self: Trainer, *arguments: object) -> object:
        if self.step + 1 == int(at) and os.environ["RANK"] == rank:
            if kind in ("main", "moment"):
                piece = next(
                    p for p in owned_pieces(self.engine, ("exp_avg",)) if (p.name[:3] == "exp") == (kind == "moment")
                )
                piece.data.view(torch.int32)[5] ^= 1
            elif kind == "generator":
                torch.rand(1)
            elif kind == "position":
                state = self.loader.state
                lane = max(state.cursors)
                self.loader._state = replace(state, cursors={**state.cursors, lane: state.cursors[lane] ^ 1})
        return compute(self, *arguments)

    def after_update(self: TrainEngine, *arguments: object) -> object:
        nonlocal done
        result = step(self, *arguments)
        done += 1
        if kind in ("dense", "expert") and done == int(at) and os.environ["RANK"] == rank:
            parameter = next(p for p in self.parameters.values() if info_of(p).is_expert == (kind == "expert"))
            parameter.data.view(torch.int32).view(-1)[5] ^= 1
        return result

    done = 0
    Trainer._compute, TrainEngine.step = before_update, after_update
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()
