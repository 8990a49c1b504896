"""Measure what the sample order costs at the size of LAION-2B: time, memory and saved state. No shard has to exist.

    python benchmarks/data_scale.py [--shards 217000] [--samples 10000] [--global-batch 4096] [--nodes 1 8] [--sources 1 3]

Each source names its shards by a brace range of s3:// names, which are not touched before they are read. All sources use
the same file names, as separate data sets often do. Shard indexes are simulated: each shard has ``--samples`` samples or,
in a second pass, between half and one and a half times as many. For each number of nodes one rank is measured, in a process
of its own that starts the loader's worker processes; instead of decoding, they locate the samples of their lanes.

A run is started from nothing and resumed at 1%, 50% and 99% of the third epoch. By then the lanes have drifted apart: each
takes ``--per-sequence`` samples per sequence with a standard deviation of ``--deviation``, so its cursor is a random walk.

Time is wall-clock time from the names of the shards until every worker knows the first sample of each of its lanes,
including the start of the processes. Memory is the proportional set size (a page shared by n processes counts 1/n for each)
of all processes of a rank, times ``--ranks``. The part that grows with the data set is the difference to the same loader
over ten shards; the rest is Python and the packages of the loader's processes. Not counted: the rank's own Python and
torch, fetching and indexing the first shards, pixels in flight, pages of mapped indexes.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.located import INDEX, Case, LocateWork
from megamoe.bench.tables import table_head, table_row
from megamoe.config.data import DataConfig
from megamoe.config.model import VisionConfig
from megamoe.data.loader.processes import WorkerProcesses
from megamoe.data.loader.step_loader import StepLoader
from megamoe.data.order.position import DataState
from megamoe.data.order.sample_order import _SHARDS, Anchor, _keys, _Mixture, shuffled
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import data_fingerprint
from megamoe.data.shards.from_config import open_data_set

PLACES = (None, 0.01, 0.5, 0.99)  # of the third epoch; None: the start of a run
OPTIONS = ("shards", "samples", "global_batch", "ranks", "workers", "shuffle_shards", "per_sequence", "deviation", "steps")
GOALS = {"seconds": 2.0, "node_mb": 200.0, "state_kb": 100.0}
FEW = 10  # shards of the data set that stands for none
_CASE = ("nodes", "sources", "counts", "when")


def main() -> None:
    """Measure all cases and print the tables."""
    arguments = _arguments()
    figures: list[dict[str, Any]] = []
    options = {name: getattr(arguments, name) for name in OPTIONS}
    for nodes, sources, varying in itertools.product(arguments.nodes, arguments.sources, (False, True)):
        case = Case(varying=varying, nodes=nodes, sources=sources, **options)
        for place in PLACES:
            figures.append(_median([_measure(case, place) for _ in range(arguments.rounds)]))
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
    parser.add_argument("--samples", type=int, default=10_000, help="Samples per shard.")
    parser.add_argument("--global-batch", type=int, default=4096)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 3], help="Sources that share the shards.")
    parser.add_argument("--ranks", type=int, default=8, help="Ranks per node.")
    parser.add_argument("--workers", type=int, default=4, help="Workers per rank.")
    parser.add_argument("--shuffle-shards", type=int, default=8)
    parser.add_argument("--per-sequence", type=float, default=8.0, help="Mean number of samples per sequence.")
    parser.add_argument("--deviation", type=float, default=0.5, help="Standard deviation of the samples per sequence.")
    parser.add_argument("--steps", type=int, default=20, help="Steps to locate after the first one.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _measure(case: Case, place: float | None) -> dict[str, Any]:
    state = None if place is None else _alone(_drifted, case, place)
    full = _alone(_rank, case, state)
    few = _few_shards(replace(case, shards=FEW * case.sources, varying=False))
    parts = ("rank", "server", "workers")
    growth = {f"{part}_growth_mb": full[f"{part}_mb"] - few[f"{part}_mb"] for part in parts}
    return {
        "nodes": case.nodes,
        "sources": case.sources,
        "varying": case.varying,
        "place": place,
        **full,
        **growth,
        "node_mb": case.ranks * sum(growth.values()),
        "node_total_mb": case.ranks * (growth["rank_growth_mb"] + full["server_mb"] + full["workers_mb"]),
        "state_kb": len(state or "") / 1e3,
    }


@functools.cache
def _few_shards(case: Case) -> dict[str, float]:
    """Measure a data set so small that it stands for none."""
    return cast(dict[str, float], _alone(_rank, case, None))


def _rank(case: Case, state: str | None) -> dict[str, float]:
    """Measure a rank and its workers until each lane's first sample is known."""
    gc.collect()
    me = psutil.Process()
    before = me.memory_full_info().pss
    started, cpu = time.perf_counter(), time.process_time()
    settings = DataConfig(train=case.train, workers=case.workers, shuffle_shards=case.shuffle_shards)
    data = open_data_set(settings, INDEX)
    named = time.perf_counter()
    data_fingerprint(data)
    known = time.perf_counter()
    loader = StepLoader(
        settings,
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
    ready = time.perf_counter()
    processes = WorkerProcesses(LocateWork(case, data, loader.state), case.workers, 1, ahead=1)
    try:
        first = [processes.receive(worker) for worker in range(case.workers)]
        done, rank_cpu = time.perf_counter(), time.process_time() - cpu
        steps = [processes.receive(worker) for worker in range(case.workers)]
        gc.collect()
        rank = me.memory_full_info().pss - before
        server, *workers = (each.memory_full_info().pss for each in me.children(recursive=True))
        times = [sum(each.cpu_times()[:2]) for each in me.children(recursive=True)]
    finally:
        processes.close()
    return {
        "names": named - started, "fingerprint": known - named, "loader": ready - known, "processes": done - ready,
        "first": max(each["first"] for each in first), "seconds": done - started, "cpu": rank_cpu + sum(times),
        "us": statistics.mean(each["us"] for each in steps), "spread": max(each["spread"] for each in steps),
        "rank_mb": rank / 1e6, "server_mb": server / 1e6, "workers_mb": sum(workers) / 1e6,
    }  # fmt: skip


def _drifted(case: Case, place: float) -> str:
    """Return the saved state of a run that has read ``place`` of the third epoch, averaged over lanes and sources."""
    total = sum(case.count(0, shard) for shard in range(case.shards // case.sources)) * case.sources
    mean = (2 + place) * total / case.global_batch
    walk = np.random.default_rng(7).normal(0, case.deviation * math.sqrt(mean / case.per_sequence), case.global_batch)
    cursors = np.maximum(0, np.rint(mean + walk)).astype(int)
    least = int((cursors * case.global_batch + np.arange(case.global_batch)).min())
    mixture = _Mixture([source["weight"] for source in case.train], case.seed)
    anchors = tuple(_anchor(case, number, mixture.before(least, number)) for number in range(case.sources))
    return json.dumps(DataState(dict(enumerate(cursors.tolist())), anchors, {}).to_json())


def _anchor(case: Case, source: int, least: int) -> Anchor:
    """Return the anchor of the window that holds position ``least`` of a source."""
    # SampleOrder would walk through every window from the beginning, as a run does, which takes minutes here
    shards = case.shards // case.sources
    counts = np.array([case.count(source, shard) for shard in range(shards)])
    epoch, within = divmod(least, int(counts.sum()))
    keys = _keys(case.seed, _SHARDS, source, epoch, 0)
    order = [shuffled(place, shards, keys) for place in range(shards)]
    starts = np.concatenate([[0], np.cumsum(counts[order])])[:: case.shuffle_shards]
    window = int(np.searchsorted(starts, within, side="right")) - 1
    return Anchor(epoch * -(-shards // case.shuffle_shards) + window, least - within + int(starts[window]))


def _alone(function: Any, *arguments: Any) -> Any:
    """Run a function in a fresh process and return its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: statistics.median(each[name] for each in rounds) if isinstance(value, float) and name != "place" else value
        for name, value in rounds[0].items()
    }


def _name(case: dict[str, Any]) -> list[str]:
    counts = "varying" if case["varying"] else "equal"
    when = "start" if case["place"] is None else f"resume at {case['place']:.0%}"
    return [str(case["nodes"]), str(case["sources"]), counts, when]


def _print_times(cases: list[dict[str, Any]]) -> None:
    print("Time to the first sample of every lane (s), and per sample from then on (µs):\n")
    start = ("names", "fingerprint", "loader and state", "processes and first samples", "of it: finding them", "all")
    after = ("CPU of rank and workers", "per sample", "windows between first and last lane")
    print(table_head([*_CASE, *start, *after]))
    for case in cases:
        names = ("names", "fingerprint", "loader", "processes", "first", "seconds", "cpu")
        cells = [f"{case[name]:.2f}" for name in names]
        print(table_row([*_name(case), *cells, f"{case['us']:.1f}", f"{case['spread']:.1f}"]))


def _print_memory(cases: list[dict[str, Any]]) -> None:
    print("\nMemory of a rank and its processes (MB); in brackets, what grows with the data set. Node: all ranks.\n")
    print(table_head([*_CASE, "rank", "server of the workers", "workers", "node grows by", "in all", "state (KB)"]))
    for case in cases:
        parts = [f"{case[f'{name}_mb']:.1f} ({case[f'{name}_growth_mb']:.1f})" for name in ("rank", "server", "workers")]
        cells = [*parts, *(f"{case[name]:.1f}" for name in ("node_mb", "node_total_mb", "state_kb"))]
        print(table_row([*_name(case), *cells]))


def _print_goals(cases: list[dict[str, Any]]) -> None:
    print(f"\n{table_head(['goal', 'worst', 'met'])}")
    for name, title in (
        ("seconds", "start and resume (s)"),
        ("node_mb", "memory of a node that grows with the data set (MB)"),
        ("state_kb", "saved state (KB)"),
    ):
        worst = max(case[name] for case in cases)
        print(table_row([f"{title} <= {GOALS[name]:g}", f"{worst:.2f}", "yes" if worst <= GOALS[name] else "no"]))


if __name__ == "__main__":
    main()
