"""What the order of samples costs at the size of LAION-2B: time, memory and saved state; no shard has to exist.

    python benchmarks/data_scale.py [--shards 217000] [--samples 10000] [--global-batch 4096] [--nodes 1 8] [--json FILE]

The shards are named by one brace range of s3:// names, which nobody looks at before they are read. What a shard's index
would say is simulated: each has ``--samples`` samples, or, in a second pass, between half and one and a half times as
many. For each number of nodes one rank and one of its workers are measured, each in a process of its own; a node holds
``--ranks`` of the one and ``--ranks`` times ``--workers`` of the other, and what a node takes is computed from that.

A run is started from nothing and resumed at 1%, 50% and 99% of the third epoch. By then the lanes have drifted apart:
sequence after sequence each takes ``--per-sequence`` samples, with a standard deviation of ``--deviation``, so after t
steps its cursor is that of a random walk. Not counted: starting the processes and importing torch (printed beside),
fetching and indexing the first shards.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import pickle
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megamoe.config.schema import DataConfig, VisionConfig
from megamoe.data.catalog import Catalog, DataSet, ShardNames, Source, data_fingerprint
from megamoe.data.loader import StepLoader
from megamoe.data.order import _SHARDS, Anchor, SampleOrder, _keys, shuffled
from megamoe.data.shards import expand_shards
from megamoe.data.state import DataState
from megamoe.data.storage import Storage
from megamoe.data.tokenizer import Tokenizer

PLACES = (None, 0.01, 0.5, 0.99)  # of the third epoch; None: the start of a run
OPTIONS = ("shards", "samples", "global_batch", "ranks", "workers", "shuffle_shards", "per_sequence", "deviation", "steps")
STAGES = ("rank_names", "rank_data_set", "rank_state", "rank_pickle", "worker_unpickle", "worker_catalog", "worker_first")
GOALS = {"seconds": 2.0, "node_mb": 200.0, "state_kb": 100.0}


@dataclass(frozen=True)
class Case:
    """What is measured; goes to the measuring processes."""

    shards: int
    samples: int
    varying: bool
    global_batch: int
    nodes: int
    ranks: int
    workers: int
    shuffle_shards: int
    per_sequence: float
    deviation: float
    steps: int
    seed: int = 1

    @property
    def spec(self) -> str:
        return f"s3://laion2b-en/shards/{{{0:06d}..{self.shards - 1:06d}}}.tar"

    def count(self, source: int, shard: int) -> int:
        """Samples of a shard: what its index would say."""
        if not self.varying:
            return self.samples
        return self.samples // 2 + (shard * 2654435761 % (1 << 32)) % (self.samples + 1)


class IndexedCatalog(Catalog):
    """A catalog of shards that are all indexed already, with the counts of a case."""

    def __init__(self, data: DataSet, case: Case) -> None:
        super().__init__(data, Storage())
        self.count = case.count  # type: ignore[method-assign]


def main() -> None:
    """Measure all cases and print the tables."""
    arguments = _arguments()
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for nodes in arguments.nodes:
            for varying in (False, True):
                case = Case(varying=varying, nodes=nodes, **{name: getattr(arguments, name) for name in OPTIONS})
                for place in PLACES:
                    rounds = [_measure(case, place, Path(folder)) for _ in range(arguments.rounds)]
                    figures.append(_median(rounds))
    print(
        f"{arguments.shards:,} shards of about {arguments.samples:,} samples, global batch {arguments.global_batch}, "
        f"windows of {arguments.shuffle_shards} shards, {arguments.ranks} ranks x {arguments.workers} workers per node; "
        f"median of {arguments.rounds}.\n"
    )
    _print_times(figures)
    _print_memory(figures)
    _print_goals(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps({"goals": GOALS, "cases": figures}, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=217_000)
    parser.add_argument("--samples", type=int, default=10_000, help="per shard")
    parser.add_argument("--global-batch", type=int, default=4096)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ranks", type=int, default=8, help="per node")
    parser.add_argument("--workers", type=int, default=4, help="per rank")
    parser.add_argument("--shuffle-shards", type=int, default=8)
    parser.add_argument("--per-sequence", type=float, default=8.0, help="samples that a sequence takes, on average")
    parser.add_argument("--deviation", type=float, default=0.5, help="standard deviation of that number")
    parser.add_argument("--steps", type=int, default=20, help="steps located after the first one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _measure(case: Case, place: float | None, folder: Path) -> dict[str, Any]:
    state = None if place is None else _alone(_drifted, case, place)
    file = folder / "to-worker"
    rank = _alone(_rank, case, state, file)
    worker = _alone(_worker, case, file)
    per_node = case.ranks * (rank["mb"] + case.workers * worker["mb"])
    return {
        "nodes": case.nodes, "varying": case.varying, "place": place, **_prefixed("rank", rank),
        **_prefixed("worker", worker), "node_mb": per_node, "state_kb": len(state or "") / 1e3,
        # a rank's workers are started one after the other and then work at the same time
        "seconds": rank["names"] + rank["data_set"] + rank["state"] + case.workers * rank["pickle"]
        + worker["unpickle"] + worker["catalog"] + worker["first"],
    }  # fmt: skip


def _rank(case: Case, state: str | None, file: Path) -> dict[str, float]:
    """What the training process of a rank does before its workers run; what they get is left in ``file``."""
    meter = _Meter()
    shards = expand_shards([case.spec])
    meter.lap("names")
    data = DataSet([Source("0", ShardNames(shards))], Path("index"))
    data_fingerprint(data)
    meter.lap("data_set")
    loader = StepLoader(
        DataConfig(workers=case.workers, shuffle_shards=case.shuffle_shards),
        vision=VisionConfig(),
        tokenizer=cast(Tokenizer, None),  # no sample is read
        dataset=data,
        seed=case.seed,
        global_batch=case.global_batch,
        micro_batch=1,
        dp_rank=0,
        dp_size=case.nodes * case.ranks,
    )
    if state is not None:
        loader.go_on_from(DataState.from_json(json.loads(state), "benchmark"))
    meter.lap("state")
    sent = pickle.dumps((loader.state, data), pickle.HIGHEST_PROTOCOL)
    meter.lap("pickle")
    file.write_bytes(sent)
    size = len(sent)
    del sent
    return {**meter.end(), "pickle_mb": size / 1e6}


def _worker(case: Case, file: Path) -> dict[str, float]:
    """What the first worker of a rank does to find the first sample of each of its lanes, and those of the next steps."""
    meter = _Meter()
    sent = file.read_bytes()
    meter.lap("read")
    state, data = pickle.loads(sent)
    del sent
    meter.lap("unpickle")
    catalog = IndexedCatalog(data, case)
    meter.lap("catalog")
    order = SampleOrder(
        [len(source.shards) for source in data.sources],
        [source.weight for source in data.sources],
        catalog.count,
        seed=case.seed,
        lanes=case.global_batch,
        shuffle_shards=case.shuffle_shards,
        anchors=state.anchors,
    )
    lanes = list(state.cursors)[: -(-len(state.cursors) // case.workers)]
    for lane in lanes:
        order.locate(lane, state.cursors[lane])
    meter.lap("first")
    taken = round(case.per_sequence)
    for step in range(case.steps):
        for lane in lanes:
            for k in range(taken):
                order.locate(lane, state.cursors[lane] + step * taken + k)
    meter.lap("steps")
    found = meter.end()
    positions = [state.cursors[lane] * case.global_batch for lane in lanes]
    window = case.samples * case.shuffle_shards
    spread = (max(positions) - min(positions)) / window
    return {**found, "lanes": len(lanes), "spread": spread, "us": 1e6 * found["steps"] / (case.steps * len(lanes) * taken)}


def _drifted(case: Case, place: float) -> str:
    """The saved state of a run that is ``place`` of the third epoch in, on average over its lanes."""
    counts = np.array([case.count(0, shard) for shard in range(case.shards)])
    total = int(counts.sum())
    mean = (2 + place) * total / case.global_batch
    walk = np.random.default_rng(7).normal(0, case.deviation * math.sqrt(mean / case.per_sequence), case.global_batch)
    cursors = np.maximum(0, np.rint(mean + walk)).astype(int)
    least = int((cursors * case.global_batch + np.arange(case.global_batch)).min())
    # the order itself would go through every window from the beginning, as a run does, which takes minutes here
    epoch = least // total
    keys = _keys(case.seed, _SHARDS, 0, epoch, 0)
    order = [shuffled(place, case.shards, keys) for place in range(case.shards)]
    starts = np.concatenate([[0], np.cumsum(counts[order])])[:: case.shuffle_shards]
    window = int(np.searchsorted(starts, least - epoch * total, side="right")) - 1
    per_epoch = -(-case.shards // case.shuffle_shards)
    anchor = Anchor(epoch * per_epoch + window, epoch * total + int(starts[window]))
    return json.dumps(DataState(dict(enumerate(cursors.tolist())), (anchor,), {}).to_json())


class _Meter:
    """Seconds and growth of the process between laps, and its growth since the meter began."""

    def __init__(self) -> None:
        gc.collect()
        self._process = psutil.Process()
        self._before = self._resident = self._process.memory_info().rss
        self._times: dict[str, float] = {"imports_mb": self._before / 1e6}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._times[name] = now - self._last
        resident = self._process.memory_info().rss
        self._times[f"{name}_mb"] = (resident - self._resident) / 1e6
        self._resident, self._last = resident, time.perf_counter()

    def end(self) -> dict[str, float]:
        gc.collect()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        grown = self._process.memory_info().rss - self._before
        return {**self._times, "mb": grown / 1e6, "peak_mb": max(grown, peak - self._before) / 1e6}


def _alone(function: Any, *arguments: Any) -> Any:
    """The result of a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in values.items()}


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: statistics.median(each[name] for each in rounds) if isinstance(value, float) and name != "place" else value
        for name, value in rounds[0].items()
    }


def _name(case: dict[str, Any]) -> str:
    counts = "varying" if case["varying"] else "equal"
    when = "start" if case["place"] is None else f"resume at {case['place']:.0%}"
    return f"{case['nodes']} | {counts} | {when}"


def _print_times(cases: list[dict[str, Any]]) -> None:
    print("Time to the first sample of every lane (s), and per sample from then on (µs):\n")
    print(
        "| nodes | counts | when | names | set and fingerprint | state | pickle, each worker | unpickle | catalog "
        "| first samples | all | per sample | windows between first and last lane of a worker |"
    )
    print("|" + " --- |" * 13)
    for case in cases:
        cells = [f"{case[stage]:.3f}" for stage in [*STAGES, "seconds"]]
        print(f"| {_name(case)} | {' | '.join(cells)} | {case['worker_us']:.1f} | {case['worker_spread']:.1f} |")


def _print_memory(cases: list[dict[str, Any]]) -> None:
    print("\nResident memory (MB) beyond what Python and torch take, and what travels:\n")
    print(
        "| nodes | counts | when | rank | its peak | worker | its peak | of it: set | labels | windows | node "
        "| sent to each worker | state (KB) |"
    )
    print("|" + " --- |" * 13)
    for case in cases:
        order = case["worker_first_mb"] + case["worker_steps_mb"]
        names = ("rank_mb", "rank_peak_mb", "worker_mb", "worker_peak_mb", "worker_unpickle_mb", "worker_catalog_mb")
        cells = [*(case[name] for name in names), order, case["node_mb"], case["rank_pickle_mb"], case["state_kb"]]
        print(f"| {_name(case)} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    imports = max(max(case["rank_imports_mb"], case["worker_imports_mb"]) for case in cases)
    start = time.perf_counter()
    _alone(int)
    seconds = time.perf_counter() - start
    print(f"\nA process with torch and this script's imports alone: {imports:.0f} MB, {seconds:.1f} s to start.")


def _print_goals(cases: list[dict[str, Any]]) -> None:
    print("\n| goal | worst | met |\n| --- | --- | --- |")
    for name, title in (
        ("seconds", "start and resume (s)"),
        ("node_mb", "memory of a node (MB)"),
        ("state_kb", "saved state (KB)"),
    ):
        worst = max(case[name] for case in cases)
        print(f"| {title} <= {GOALS[name]:g} | {worst:.2f} | {'yes' if worst <= GOALS[name] else 'no'} |")


if __name__ == "__main__":
    main()
