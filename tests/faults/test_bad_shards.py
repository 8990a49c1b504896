"""Shards that cannot be used, in real training: all ranks stop with one line, or all go on alike and name them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.workers.processes import local_environments
from megamoe.checkpoint.folders import newest_checkpoint
from megamoe.checkpoint.manifest import read_manifest
from megamoe.data.order.sample_order import SampleOrder
from megamoe.data.shards.catalog import Catalog, DataSet, Source
from megamoe.data.shards.storage import Storage
from tests.data import shard_server
from tests.data.shard_server import Handler, ShardServer, serving
from tests.training import LOSSES, ROOT, audit, largest_difference, megamoe, metrics, small_config, train, write_config

CUT, MISSING = "00001.tar", "00003.tar"
GOOD = ("00000.tar", "00002.tar", "00004.tar")  # 160 samples
LANES = 8
EXPERT, PIPELINE = ("parallel.expert=2",), ("parallel.pipeline=2",)


@pytest.fixture(scope="module")
def server() -> Iterator[ShardServer]:
    """Has nothing: what is asked for is not found."""
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def here(folder: Path, server: ShardServer) -> Path:
    """A config whose second shard is truncated and whose fourth is on the server. Its seed puts them into two windows."""
    path = folder / "shards/train" / CUT
    os.truncate(path, path.stat().st_size * 2 // 3 // 512 * 512)
    local = "shards/train/{00000,00001,00002}.tar"
    data = {
        "train": f"{local}::{server.url}/{MISSING}::shards/train/00004.tar",
        "bad_shards": "quarantine",
        "cache": str(folder / "cache"),
    }
    run = {"run": {"seed": 4}, "train": {"steps": 10}, "checkpoint": {"every": 2, "keep": 10}}
    write_config(folder, small_config(data=data, launch={"max_restarts": 2}, **run))
    return folder


@pytest.fixture(scope="module")
def whole(here: Path) -> Path:
    """The undisturbed run, on two ranks that share their experts."""
    done = megamoe("train", "config.yaml", "--nproc", "2", "run.name=whole", "data.workers=1", *EXPERT, folder=here)
    for shard, reason in ((CUT, "truncated at byte"), (MISSING, "cannot be had, 1 try (HTTP 404 Not Found)")):
        (line,) = [line for line in done.stderr.splitlines() if shard in line]
        assert "going on without a shard: shard " in line and reason in line
    assert "Traceback" not in done.stderr
    return here / "runs/whole"


def quarantine(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "lost/shards.jsonl").read_text().splitlines()]


def without_ranks(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "ranks"} for row in quarantine(run)]


def due(folder: Path, run: Path) -> tuple[Counter[str], Counter[str]]:
    """The samples that came up to the last checkpoint by the order of samples: in the first epoch, and in all."""
    position = read_manifest(newest_checkpoint(run)).state["position"]  # type: ignore[arg-type]
    shards = [str(folder / f"shards/train/0000{n}.tar") for n in range(5)]
    data = DataSet([Source("0", shards)], folder / "check", quarantine=position["quarantine"])
    catalog = Catalog(data, Storage())
    order = SampleOrder([5], [1.0], catalog.count, seed=4, lanes=LANES, shuffle_shards=2)
    first: Counter[str] = Counter()
    everything: Counter[str] = Counter()
    for lane, cursor in enumerate(position["cursors"]):
        for k in range(cursor):
            ref = order.locate(lane, k)
            if catalog.label(0, ref.shard) in data.quarantine:
                name = f"{catalog.label(0, ref.shard)}#sample {ref.sample}"
            else:
                name = catalog.sample(0, ref.shard, ref.sample).id
            everything[name] += 1
            first[name] += ref.epoch == 0
    return +first, everything


def ids(run: Path) -> Counter[str]:
    return Counter(name for _, _, name in audit(run))


def test_all_ranks_go_on_without_the_shards_and_say_so(here: Path, whole: Path) -> None:
    rows = metrics(whole)
    cut, missing = quarantine(whole)
    assert (cut["shard"], cut["samples"], missing["shard"], missing["samples"]) == (CUT, 0, MISSING, 0)
    assert "truncated at byte" in cut["reason"] and "HTTP 404" in missing["reason"]
    assert cut["step"] < missing["step"] < 10
    assert [row["bad_shards"] for row in rows] == [
        sum(row["step"] >= shard["step"] for shard in (cut, missing)) for row in rows
    ]
    first, everything = due(here, whole)
    assert Counter(first.values()) == {1: 160} and {name.partition("#")[0] for name in first} == set(GOOD)
    assert ids(whole) == everything
    assert rows[-1]["samples"] == sum(row["sources"]["0"]["samples"] for row in rows) == everything.total()
    assert rows[-1]["lost"] == 0, "nobody knows how many samples they held"
    assert list((whole / "lost").iterdir()) == [whole / "lost/shards.jsonl"]


def test_a_pipeline_goes_on_alike(here: Path, whole: Path) -> None:
    rows = train(here, "pipeline", 2, PIPELINE)
    difference, where = largest_difference(metrics(whole), rows)
    assert difference <= 1e-5, where
    assert audit(here / "runs/pipeline") == audit(whole)
    assert without_ranks(here / "runs/pipeline") == without_ranks(whole)
    assert [row["bad_shards"] for row in rows] == [row["bad_shards"] for row in metrics(whole)]


def test_killed_and_resumed_it_keeps_the_quarantine(here: Path, whole: Path) -> None:
    command = [sys.executable, "-m", "megamoe", "train", "config.yaml", "--nproc", "2", "run.name=killed", *EXPERT]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = here / "runs/killed"
    process = subprocess.Popen(command, cwd=here, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints/step-00000004").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        (pids,) = run.glob("logs/*/pids.json")
        os.kill(json.loads(pids.read_text())["1"], signal.SIGKILL)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert len(list(run.glob("logs/*/pids.json"))) == 2, "it was restarted once"
    assert errors.count("going on without a shard") == 2, "a shard in quarantine is not tried again"
    assert [[row[key] for key in (*LOSSES, "lost", "bad_shards")] for row in metrics(run)] == [
        [row[key] for key in (*LOSSES, "lost", "bad_shards")] for row in metrics(whole)
    ]
    assert audit(run) == audit(whole)
    assert without_ranks(run) == without_ranks(whole)


def test_resumed_on_one_rank_from_before_a_quarantine_it_is_taken_again_at_the_same_step(here: Path, whole: Path) -> None:
    run = shutil.copytree(whole, here / "runs/again")
    cut, missing = quarantine(run)
    (kept,) = [run / "checkpoints/step-00000002"]
    assert cut["step"] <= 2 < missing["step"]
    for path in run.glob("checkpoints/step-*"):
        if path != kept:
            shutil.rmtree(path)
    rows = train(here, "again", 1, resume="auto")
    difference, where = largest_difference(metrics(whole), rows)
    assert difference <= 1e-5, where
    assert audit(run) == audit(whole)
    assert without_ranks(run) == without_ranks(whole)
    assert [shard["ranks"] for shard in quarantine(run)] == [cut["ranks"], [0]]


def test_what_one_rank_alone_cannot_read_is_left_out_by_both_and_counted(
    here: Path, whole: Path, server: ShardServer, drawn: Path
) -> None:
    """Two nodes: the shard needs a password, and only the first one has it. Each has a cache of its own."""

    def guarded(handler: Handler, body: bytes) -> None:
        answer = shard_server.whole if handler.headers["Authorization"] == expected else shard_server.status(401)
        answer(handler, body)

    expected = f"Basic {base64.b64encode(b'user:secret').decode()}"
    server.objects[f"/{MISSING}"] = (drawn / "shards/train" / MISSING).read_bytes()
    server.answers[f"/{MISSING}"] = [guarded] * 9
    (here / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    (here / "netrc").chmod(0o600)
    ranks = []
    for rank, environment in local_environments(2).items():
        variables = environment | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "NETRC": str(here / "netrc" if rank == 0 else here / "none"),
            "MEGAMOE_CACHE": str(here / f"cache-{rank}"),
        }
        command = [sys.executable, "-m", "megamoe", "train", "config.yaml", "run.name=nodes", "data.cache=null"]
        ranks.append(subprocess.Popen(command, cwd=here, env=variables, stderr=subprocess.PIPE, text=True))
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    server.objects.clear()
    run = here / "runs/nodes"
    cut, guarded_shard = quarantine(run)
    assert cut["shard"] == CUT and cut["samples"] == 0
    assert (guarded_shard["shard"], guarded_shard["samples"], guarded_shard["ranks"]) == (MISSING, 70, [1])
    assert "HTTP 401" in guarded_shard["reason"] and "secret" not in "".join(errors)
    _, everything = due(here, run)
    lost = [json.loads(line) for path in run.glob("lost/rank-*.jsonl") for line in path.read_text().splitlines()]
    named = Counter(row["id"] for row in lost)
    assert ids(run) + named == everything and {name.partition("#")[0] for name in named} == {MISSING}
    assert {row["reason"] for row in lost} == {"shard: in quarantine"}
    rows = metrics(run)
    assert rows[-1]["lost"] == sum(row["sources"]["0"]["lost_shard"] for row in rows) == len(lost) > 10


def _refused(folder: Path, *arguments: str) -> str:
    """The one line of a run that ends with status 2, and at once: a wrong request is not tried again."""
    done = megamoe("train", "config.yaml", "--nproc", "2", "run.name=refused", *arguments, folder=folder, check=False)
    run = folder / "runs/refused"
    attempts = len(list(run.glob("logs/attempt-*")))
    shutil.rmtree(run / "logs")
    assert done.returncode == 2, done.stderr
    assert attempts == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    return line


def test_without_leave_to_go_on_the_first_bad_shard_stops_all_ranks_with_one_line(here: Path) -> None:
    line = _refused(here, "data.bad_shards=stop", "data.workers=1")
    assert line.startswith(f"megamoe: error: shard shards/train/{CUT}: truncated at byte ")
    assert line.endswith("; copy or write it again")


def test_more_bad_shards_than_allowed_stop_all_ranks_and_each_is_on_record(here: Path) -> None:
    line = _refused(here, "data.max_bad_shards=1", *PIPELINE)
    assert f"data.max_bad_shards 1: 2 shards cannot be used ({CUT}, {MISSING}; see lost/shards.jsonl" in line
    assert [shard["shard"] for shard in quarantine(here / "runs/refused")] == [CUT, MISSING]
