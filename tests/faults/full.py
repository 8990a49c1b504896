"""`megamoe` with a fault: from a checkpoint on, the disk of a rank takes none (RLIMIT_FSIZE), and writing is slow for all.

python full.py RANK,STEP train ...
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

_LIMIT = 1 << 16  # bytes of a file: enough for the records of a run


def main() -> None:
    from megamoe import cli
    from megamoe.checkpoint import checkpointer
    from megamoe.checkpoint.folders import checkpoint_step

    wrong, at = map(int, sys.argv[1].split(","))
    write = checkpointer.write_pieces

    def faulty(folder: Path, rank: int, pieces: object) -> object:
        time.sleep(0.5)
        if rank == wrong and (checkpoint_step(folder) or 0) >= at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT, _LIMIT))
        return write(folder, rank, pieces)

    checkpointer.write_pieces = faulty
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()
