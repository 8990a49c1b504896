"""The process of one part: python -m benchmarks.gpu.part NAME --result FILE ..."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import torch

from benchmarks.gpu.context import Context, be_the_only_rank
from benchmarks.gpu.parts import PARTS


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--tiny", action="store_true")
    for path in ("--data", "--scratch", "--result"):
        parser.add_argument(path, type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
    be_the_only_rank()
    context = Context(torch.device(arguments.device), arguments.tiny, arguments.data, arguments.scratch, arguments.result)
    importlib.import_module(f"benchmarks.gpu.{PARTS[arguments.name].module}").measure(context)


if __name__ == "__main__":
    main()
