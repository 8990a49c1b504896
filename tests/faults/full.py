"""`megamoe` with a fault: after a step the disk of a rank takes no more checkpoints (RLIMIT_FSIZE), and is slow to say so.

python full.py RANK,STEP train ...
"""

from __future__ import annotations

import os
import resource
import sys
import time

_LIMIT = 1 << 16  # bytes of a file: enough for the records of a run


def main() -> None:
    from megamoe import cli
    from megamoe.checkpoint import checkpointer
    from megamoe.parallel.engine import TrainEngine

    rank, at = sys.argv[1].split(",")
    count = 0
    step, write = TrainEngine.step, checkpointer.write_pieces

    def faulty(self: TrainEngine, *arguments: object) -> object:
        nonlocal count
        count += 1
        if count > int(at) and os.environ["RANK"] == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT, _LIMIT))
        return step(self, *arguments)

    def slow(*arguments: object) -> object:
        time.sleep(0.5)
        return write(*arguments)

    TrainEngine.step = faulty
    checkpointer.write_pieces = slow
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()
