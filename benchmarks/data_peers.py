"""Compare MegaMoE's data loader with others over the same pictures: speed, start, memory, resume.

    python benchmarks/data_peers.py [--samples 6400] [--seconds 20] [--rounds 3] [--only NAME ...] [--json FILE]

Every loader reads the same generated JPEGs (224 pixels square, about 27 KB, with captions) from its own format on the local
disk, shuffled, with ``--workers`` worker processes, and returns batches of ``--batch`` pictures as uint8 (224, 224, 3) with
their captions. Ours also tokenises and packs them. Loaders run one after the other, in ``--rounds`` rounds; figures are
medians. The limit is what the same number of processes decodes from memory, with our decoder and no loader at all.

- *first batch*: from constructing the loader to its first batch, without imports;
- *memory*: the main process, all others (workers, fork servers), and all together with each shared page counted once;
- *resume*: from constructing the loader with a state that another process saved in the middle of an epoch, to the first
  batch;
- *goes on*: compares what it then reads with the rest of the epoch as an uninterrupted process read it: ``the same``
  batches, or the number of samples that are missing.

Each peer gets an environment of its own (``--environments``), made with venv and pip on the first run, because they pin
different versions. They ask for torch==2.13.0; if the package index has a CUDA build of it, that is gigabytes per peer.
Pictures, formats and environments are kept for the next run. A peer that cannot be installed or run is reported with the
reason, and the others are measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import ROOT, environment
from megamoe.bench.pictures import caption, jpeg
from megamoe.bench.tables import table_head, table_row

HERE = ROOT / "benchmarks"
COMMON = ("torch==2.13.0", "psutil==7.2.2", "simplejpeg==1.9.0", "pillow==13.0.0")
PHASE_LIMIT = 900  # seconds


@dataclass(frozen=True)
class Contender:
    """A loader with one decoder. Without ``packages`` it runs in this environment; ``module`` is in benchmarks/peers."""

    title: str
    module: str
    decoder: str
    packages: tuple[str, ...] = ()


STREAMING = ("mosaicml-streaming==0.13.*",)
LITDATA = ("litdata==0.2.76",)
ENERGON = ("megatron-energon==7.4.1",)
CONTENDERS = (
    Contender("MegaMoE", "with_megamoe", "simplejpeg"),
    Contender("webdataset", "with_webdataset", "pillow", ("webdataset==1.0.2",)),
    Contender("webdataset", "with_webdataset", "simplejpeg", ("webdataset==1.0.2",)),
    Contender("MosaicML Streaming", "with_streaming", "pillow", STREAMING),
    Contender("MosaicML Streaming", "with_streaming", "simplejpeg", STREAMING),
    Contender("litdata", "with_litdata", "pillow", LITDATA),
    Contender("litdata", "with_litdata", "simplejpeg", LITDATA),
    Contender("megatron-energon", "with_energon", "pillow", ENERGON),
    Contender("megatron-energon", "with_energon", "simplejpeg", ENERGON),
)


class Failed(Exception):
    """A loader could not be installed or run; the message gives the reason in one line."""


def main() -> None:
    """Prepare all loaders, measure them in rounds, and print the table."""
    arguments = _arguments()
    bench = Bench(arguments)
    files = make_pictures(bench.pictures, arguments.samples)
    size = statistics.mean(file.stat().st_size for file in files)
    failures: dict[str, str] = {}
    able: list[Contender] = []
    for contender in CONTENDERS:
        if arguments.only and contender.module.removeprefix("with_") not in arguments.only:
            continue
        if contender.title in failures:  # already failed with its other decoder
            continue
        try:
            bench.prepare(contender)
            able.append(contender)
        except Failed as failed:
            failures[contender.title] = str(failed)
    limits: list[float] = []
    figures: dict[Contender, list[dict[str, Any]]] = defaultdict(list)
    for number in range(arguments.rounds):
        _tell(f"round {number + 1} of {arguments.rounds}: decode limit")
        limits.append(bench.decode_limit())
        for contender in able:
            _tell(f"round {number + 1} of {arguments.rounds}: {contender.title}, {contender.decoder}")
            try:
                figures[contender].append(bench.measure(contender))
            except Failed as failed:
                failures[f"{contender.title}, {contender.decoder}"] = str(failed)
    limit = statistics.median(limits)
    rows = [{"loader": c.title, "decoder": c.decoder, **_medians(rounds)} for c, rounds in figures.items() if rounds]
    print(
        f"{arguments.samples:,} pictures of {size / 1e3:.1f} KB, {arguments.workers} workers, "
        f"batches of {arguments.batch}; median of {arguments.rounds} rounds of {arguments.seconds:g} s.\n"
    )
    _print(rows, limit)
    for title, why in failures.items():
        print(f"\n{title}: not measured: {why}")
    if arguments.json:
        content = {"picture_bytes": size, "decode_limit": limit, "loaders": rows, "not_measured": failures}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=6400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20, help="Duration of each speed measurement.")
    parser.add_argument("--rounds", type=int, default=3)
    names = sorted({contender.module.removeprefix("with_") for contender in CONTENDERS})
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--folder", type=Path, default=HERE / ".data", help="Folder for pictures and formats.")
    parser.add_argument("--environments", type=Path, default=HERE / ".environments")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.samples < 2 * arguments.batch:
        parser.error(f"--samples {arguments.samples}: fewer than two batches of {arguments.batch}; an epoch has no middle")
    return arguments


class Bench:
    """Runs phases of contenders, each in its environment."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._folder: Path = arguments.folder.resolve() / f"{arguments.samples}"
        self._environments: Path = arguments.environments.resolve()
        self.pictures = self._folder / "pictures"

    def prepare(self, contender: Contender) -> None:
        """Make the loader's environment and format, unless they exist already."""
        if contender.packages:
            self._install(contender)
        data = self._data(contender)
        done = data / ".prepared"
        if done.exists():
            return
        _tell(f"{contender.title}: making its format")
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(parents=True)
        self._phase(contender, "prepare")
        done.touch()

    def measure(self, contender: Contender) -> dict[str, Any]:
        """Measure all figures of one round."""
        found = self._phase(contender, "rate")
        stopped = self._phase(contender, "stop")
        found["state_bytes"] = stopped["state_bytes"]
        if stopped["state_bytes"] is not None:
            resumed = self._phase(contender, "resume")
            expected = {key for batch in stopped["keys"] for key in batch}
            found["resume_seconds"] = resumed["resume_seconds"]
            found["same_batches"] = stopped["keys"] == resumed["keys"]
            found["expected"] = len(expected)
            found["missing"] = len(expected - {key for batch in resumed["keys"] for key in batch})
        return found

    def decode_limit(self) -> float:
        """Measure the samples per second that the cores decode without a loader."""
        command = [sys.executable, "-m", "peers.decode_limit", "--pictures", str(self.pictures), *self._setting()]
        return float(self._run(command, ours=True)["samples_per_second"])

    def _data(self, contender: Contender) -> Path:
        return self._folder / contender.module.removeprefix("with_")

    def _environment(self, contender: Contender) -> Path:
        return self._environments / contender.module.removeprefix("with_")

    def _install(self, contender: Contender) -> None:
        folder = self._environment(contender)
        wanted, done = "\n".join((*COMMON, *contender.packages)), folder / ".installed"
        if done.exists() and done.read_text() == wanted:
            return
        _tell(f"{contender.title}: installing {' '.join(contender.packages)}")
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *COMMON, *contender.packages],
        ):
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise Failed(f"cannot be installed: {_reason(result.stdout + result.stderr)}")
        done.write_text(wanted)

    def _setting(self) -> list[str]:
        arguments = self._arguments
        return [f"--workers={arguments.workers}", f"--batch={arguments.batch}", f"--seconds={arguments.seconds}"]

    def _phase(self, contender: Contender, phase: str) -> dict[str, Any]:
        python = str(self._environment(contender) / "bin/python") if contender.packages else sys.executable
        data = self._data(contender)
        command = [python, "-m", f"peers.{contender.module}", phase, "--pictures", str(self.pictures), "--data", str(data)]
        command += ["--state", str(data.with_suffix(".state")), "--decoder", contender.decoder, *self._setting()]
        return self._run(command, ours=not contender.packages)

    def _run(self, command: list[str], ours: bool) -> dict[str, Any]:
        paths = (HERE, ROOT) if ours else (HERE,)
        try:
            done = subprocess.run(command, env=environment(*paths), capture_output=True, text=True, timeout=PHASE_LIMIT)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"{command[3]}: not done after {PHASE_LIMIT} s") from error
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise Failed(f"{command[3]}: {_reason(done.stderr or done.stdout)}")
        found: dict[str, Any] = json.loads(lines[-1])
        return found


def make_pictures(folder: Path, count: int) -> list[Path]:
    """Write ``folder/000000.jpg`` ... with captions in ``.txt`` beside them, unless they exist already."""
    listing = folder / "complete.json"
    if not listing.exists() or json.loads(listing.read_text())["count"] != count:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / f"{number:06d}.jpg").write_bytes(jpeg(number))
            (folder / f"{number:06d}.txt").write_text(caption(number))
        listing.write_text(json.dumps({"count": count}))
    return [folder / f"{number:06d}.jpg" for number in range(count)]


def _reason(output: str) -> str:
    """Return the most telling line of an output: pip's last error, or a traceback's last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") or "Error: " in line]
    return (errors or lines or ["ended without output"])[-1][:300]


def _medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"rounds": rounds}
    for name in rounds[0]:
        values = [each[name] for each in rounds]
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            found[name] = statistics.median(values)
        else:
            found[name] = all(values) if isinstance(values[0], bool) else values[0]
    return found


def _print(rows: Sequence[dict[str, Any]], limit: float) -> None:
    memory = "memory: main + others, together (MB)"
    speed = ("samples/s", "of the limit", "first batch (s)")
    print(table_head(["loader", "decoder", *speed, memory, "resume (s)", "goes on", "state (bytes)"]))
    print(table_row(["decode limit", "simplejpeg", f"{limit:,.0f}", "100%", *[""] * 5]))
    for row in rows:
        rate = row["samples_per_second"]
        cells = [f"{rate:,.0f}", f"{rate / limit:.0%}", f"{row['first_seconds']:.2f}"]
        cells.append(f"{row['main_mb']:,.0f} + {row['workers_mb']:,.0f}, {row['pss_mb']:,.0f}")
        if row["state_bytes"] is None:
            cells += ["none", "", ""]
        else:
            on = "the same" if row["same_batches"] else f"{row['missing']:g} of {row['expected']:g} do not come"
            cells += [f"{row['resume_seconds']:.2f}", on, f"{row['state_bytes']:,.0f}"]
        print(table_row([row["loader"], row["decoder"], *cells]))


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
