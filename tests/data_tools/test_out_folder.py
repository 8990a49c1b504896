"""What filter, dedup, split and reshard promise about the folder that they write to."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from pathlib import Path

import pytest

from megamoe.core.errors import DataError
from tests.data_tools.shaping import digests, numbered, outcome, run

VERBS = {
    "filter": ("--where", "n>=3"),
    "dedup": ("--near",),
    "split": ("--shares", "0.7,0.3"),
    "reshard": ("--shard-size", 7, "--shuffle"),
}
OTHERS = {
    "filter": ("--where", "n>=4"),
    "dedup": ("--near", "--distance", 3),
    "split": ("--shares", "0.71,0.29"),
    "reshard": ("--shard-size", 7, "--shuffle", "--seed", 1),
}
verbs = pytest.mark.parametrize("verb", list(VERBS))


def tars(folder: Path) -> dict[Path, int]:
    """Return the shards and when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar") if not path.name.startswith(".")}


@verbs
def test_the_bytes_do_not_depend_on_processes(tmp_path: Path, verb: str) -> None:
    source = numbered(tmp_path / "s", [20, 3, 17])
    outcome(verb, source, tmp_path / "a", *VERBS[verb], "--processes", 1)
    outcome(verb, source, tmp_path / "b", *VERBS[verb], "--processes", 2)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@verbs
def test_a_killed_run_goes_on_with_what_is_missing(tmp_path: Path, verb: str) -> None:
    source, out = numbered(tmp_path / "s", [20] * 25), tmp_path / "o"
    expected = outcome(verb, source, tmp_path / "whole", *VERBS[verb])
    fork = multiprocessing.get_context("fork")
    job = fork.Process(target=run, args=(verb, source, out, *VERBS[verb]))
    job.start()
    limit = time.monotonic() + 20
    while len(tars(out)) < 3 and time.monotonic() < limit:
        time.sleep(0.001)
    job.kill()
    job.join()
    assert job.exitcode == -signal.SIGKILL
    half = tars(out)
    leftover = out / ("train" if verb == "split" else "") / f".00020.tar.{job.pid}.tmp"
    leftover.write_bytes(b"half a shard")
    assert 3 <= len(half) < len(expected["shards"]) - 2
    found = outcome(verb, source, out, *VERBS[verb])
    assert found | {"out": ""} == expected | {"out": ""}
    assert digests(out) == digests(tmp_path / "whole")  # whole also in that nothing else lies there
    # the shard that was written last may not have been noted when the kill came
    unchanged = sum(tars(out)[path] == time_written for path, time_written in half.items())
    assert unchanged >= len(half) - (2 if verb == "split" else 1)


@verbs
def test_a_finished_run_is_not_done_again_unless_a_shard_is_gone(tmp_path: Path, verb: str) -> None:
    source, out = numbered(tmp_path / "s", [20, 20]), tmp_path / "o"
    first = outcome(verb, source, out, *VERBS[verb])
    written, whole = tars(out), digests(out)
    assert outcome(verb, source, out, *VERBS[verb]) == first and tars(out) == written
    next(iter(written)).unlink()
    assert outcome(verb, source, out, *VERBS[verb]) == first and digests(out) == whole


@verbs
def test_another_request_for_the_folder_is_refused(tmp_path: Path, verb: str) -> None:
    source, out = numbered(tmp_path / "s", [20]), tmp_path / "o"
    outcome(verb, source, out, *VERBS[verb])
    before = digests(out)
    result = run(verb, source, out, *OTHERS[verb])
    assert isinstance(result.exception, DataError) and "belongs to a request with another" in str(result.exception)
    numbered(source, [20, 1])
    result = run(verb, source, out, *VERBS[verb])
    assert isinstance(result.exception, DataError) and "another source" in str(result.exception)
    assert digests(out) == before


@verbs
def test_a_folder_with_other_shards_is_refused_before_anything_is_written(tmp_path: Path, verb: str) -> None:
    source, out = numbered(tmp_path / "s", [20]), tmp_path / "o"
    shard = out / ("train" if verb == "split" else "") / "old.tar"
    shard.parent.mkdir(parents=True)
    shutil.copy(source / "00000.tar", shard)
    before = digests(tmp_path)
    result = run(verb, source, out, *VERBS[verb])
    assert isinstance(result.exception, DataError) and f"{shard}: not made by this request" in str(result.exception)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("verb", ["filter", "dedup", "reshard"])
def test_the_source_itself_is_refused_as_output(tmp_path: Path, verb: str) -> None:
    source = numbered(tmp_path / "s", [20])
    before = digests(tmp_path)
    assert isinstance(run(verb, source, source, *VERBS[verb]).exception, DataError)
    assert digests(tmp_path) == before


@verbs
def test_a_dry_run_counts_the_same_and_writes_nothing(tmp_path: Path, verb: str) -> None:
    source = numbered(tmp_path / "s", [20, 20])
    before = digests(tmp_path)
    dry = outcome(verb, source, tmp_path / "o", *VERBS[verb], "--dry-run")
    assert digests(tmp_path) == before and not (tmp_path / "o").exists()
    real = outcome(verb, source, tmp_path / "o", *VERBS[verb])
    assert dry["dry_run"] and {name: real[name] for name in ("read", "kept", "dropped", "lost", "kept_as")} == {
        name: dry[name] for name in ("read", "kept", "dropped", "lost", "kept_as")
    }
    assert set(dry["shards"]) == set(real["shards"])


@verbs
def test_people_read_one_line(tmp_path: Path, verb: str) -> None:
    source = numbered(tmp_path / "s", [20])
    result = run(verb, source, tmp_path / "o", *VERBS[verb])
    kept = json.loads((tmp_path / f"o/{verb}.json").read_text())["result"]["kept"]
    assert result.stdout.startswith(f"{tmp_path}/o: {kept} of 20 samples kept in ") and result.stdout.count("\n") == 1


def test_a_damaged_request_is_named(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o/filter.json").write_text("{")
    result = run("filter", numbered(tmp_path / "s", [2]), tmp_path / "o", "--where", "n>=0")
    assert isinstance(result.exception, DataError) and "filter.json: damaged; remove" in str(result.exception)
