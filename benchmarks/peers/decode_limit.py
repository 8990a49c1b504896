"""Measure the limit of any loader with this many processes: each decodes JPEGs from memory, over and over.

python -m peers.decode_limit --pictures FOLDER [--workers 2] [--batch 64] [--seconds 20]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
from peers.measure import SIDE

from megamoe.data.sample.decode import decode_image

_together: Barrier  # set in each process


def main() -> None:
    """Print one line of JSON: the samples per second of all processes together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    jpegs = sorted(arguments.pictures.glob("*.jpg"))
    together = multiprocessing.Barrier(arguments.workers)
    with multiprocessing.Pool(arguments.workers, _begin, (together,)) as pool:
        work = [(jpegs[n :: arguments.workers], arguments.batch, arguments.seconds) for n in range(arguments.workers)]
        rates = pool.starmap(_decode, work, chunksize=1)
    print(json.dumps({"samples_per_second": sum(rates)}))


def _begin(together: Barrier) -> None:
    global _together
    _together = together


def _decode(jpegs: list[Path], batch: int, seconds: float) -> float:
    pictures = [jpeg.read_bytes() for jpeg in jpegs]
    out = np.empty((batch, SIDE, SIDE, 3), dtype=np.uint8)
    _together.wait()
    done, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        for row in out:
            decode_image(pictures[done % len(pictures)], SIDE, out=row)
            done += 1
    return done / taken


if __name__ == "__main__":
    main()
