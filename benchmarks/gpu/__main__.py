"""Measure everything on one GPU, or part of it, and write OUT/result.json and OUT/page.md."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import ROOT
from benchmarks.gpu.page import page
from benchmarks.gpu.parts import PARTS

BUDGET = 480  # seconds; machines are lent by the minute


def main() -> int:
    """Run the parts in turn. Status 0: all were done and what they checked holds; 1: not; 2: the request is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Folder for result.json, page.md and logs.")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Folder with train/ and tokenizer.model.  [default: draw]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the code, not the device.")
    parser.add_argument("--tiny", action="store_true", help="Sizes that a CPU does in seconds; figures mean nothing.")
    parser.add_argument("--parts", default=",".join(PARTS), help="Those to run, by comma.  [default: all]")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="Time for everything.  [default: %(default)s]")
    parser.add_argument("--scratch", type=Path, help="Where checkpoints of 12.5 GB may lie.  [default: a temporary folder]")
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts: there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if arguments.device == "cuda" and (missing := _no_gpu()):
        parser.error(f"--device cuda: {missing}; use --device cpu --tiny to try the code without one")
    if arguments.data is not None and not (arguments.data / "tokenizer.model").is_file():
        parser.error(f"--data {arguments.data}: has no tokenizer.model; benchmarks/gpu/pack.sh makes such a folder")
    end = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": arguments.device,
        "tiny": arguments.tiny,
        "parts": {},
    }
    scratch = Path(tempfile.mkdtemp(prefix="megamoe-gpu-", dir=arguments.scratch))
    try:
        data = arguments.data or _draw(scratch)
        for name in names:
            result["parts"][name] = _run(name, arguments, data.resolve(), scratch, end)
            _write(arguments.out, result)
            part = result["parts"][name]
            print(f"{name}: {part['ended']} after {part['seconds']:.0f} s", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print((arguments.out / "page.md").read_text(encoding="utf-8"))
    good = all(part["ended"] == "done" and part["figures"].get("holds", True) for part in result["parts"].values())
    return 0 if good else 1


def _run(name: str, arguments: argparse.Namespace, data: Path, scratch: Path, end: float) -> dict[str, Any]:
    """Run one part in a process group of its own, and end all of it when its time is up."""
    limit = min(PARTS[name].seconds, end - time.monotonic())
    figures = scratch / f"{name}.json"
    folder = scratch / name
    folder.mkdir()
    if limit < 5:
        return {"ended": "not started, the time was up", "seconds": 0.0, "figures": {}}
    command = [sys.executable, "-m", "benchmarks.gpu.part", name, "--device", arguments.device, "--data", str(data)]
    command += ["--scratch", str(folder), "--result", str(figures), *(["--tiny"] if arguments.tiny else [])]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    started = time.monotonic()
    with (arguments.out / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
            ended = "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"cut off at {limit:.0f} s"
        finally:
            _end(process)
    part = {"ended": ended, "seconds": time.monotonic() - started, "figures": {}}
    if figures.is_file():
        part["figures"] = json.loads(figures.read_text(encoding="utf-8"))
    if ended != "done":
        part["log"] = (arguments.out / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-4000:]
    shutil.rmtree(folder, ignore_errors=True)
    return part


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what a part has left: its own group. Processes of `megamoe train` die with their parent."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _write(out: Path, result: dict[str, Any]) -> None:
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "page.md").write_text(page(result), encoding="utf-8")


def _draw(scratch: Path) -> Path:
    """Draw shards as pack.sh does."""
    folder = scratch / "data"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    synth = ["data", "synth", "drawn", "--samples", "512", "--seed", "1", "--level", "3", "--image-size", "224"]
    for verb in (
        [*synth, "--shard-size", "128", "--validation", "32"],
        ["data", "tokenizer", "drawn/train", "tokenizer", "--vocab-size", "400"],
    ):
        subprocess.run([sys.executable, "-m", "megamoe", *verb], cwd=folder, env=environment, check=True)
    (folder / "drawn/train").rename(folder / "train")
    return folder


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU"


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
