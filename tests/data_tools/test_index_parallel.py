"""`megamoe data index` over many shards: in parallel, on a cluster, and after an interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from megamoe.commands.data.group import data
from megamoe.core.errors import DataError
from megamoe.data.shards.index import load_index
from tests.data.shard_factory import sample, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Make six shards of 3 to 8 samples; one sample of 00002.tar has no caption and one of 00003.tar repeats."""
    folder = tmp_path / "shards"
    for n in range(6):
        members = [member for i in range(3 + n) for member in sample(100 * n + i)]
        extra = {2: [("x.jpg", b"1")], 3: [*sample(300)]}.get(n, [])
        write_tar(folder / f"{n:05d}.tar", [*members, *extra])
    return folder


def index(*arguments: object) -> Result:
    return CliRunner().invoke(data, ["index", *(str(each) for each in arguments)])


def totals(*arguments: object) -> dict[str, object]:
    result = index(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    assert isinstance(found.pop("seconds"), float)
    return found


def indexes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.idx")}


def test_two_processes_write_the_bytes_that_one_writes(shards: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    expected = {"shards": 6, "samples": 33, "incomplete": 1, "duplicates": 1, "skipped": 0, "unusable": [], "bytes": size}
    assert totals(shards, "--out", tmp_path / "one", "--processes", 1) == expected
    assert totals(shards, "--out", tmp_path / "two", "--processes", 2) == expected
    assert indexes(tmp_path / "one") == indexes(tmp_path / "two") and len(indexes(tmp_path / "one")) == 6


def test_a_cluster_writes_the_bytes_that_one_process_writes(shards: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options, host="127.0.0.1") as cluster:
        found = totals(shards, "--out", tmp_path / "cluster", "--cluster", cluster.scheduler_address)
    assert found == totals(shards, "--out", tmp_path / "one", "--processes", 1)
    assert indexes(tmp_path / "cluster") == indexes(tmp_path / "one")


def test_shards_whose_index_is_current_are_skipped_but_counted(shards: Path) -> None:
    first = totals(shards)
    before = {path: path.stat().st_mtime_ns for path in shards.glob("*.idx")}
    assert totals(shards) == first | {"skipped": 6}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert index(shards).output == "6 shards, 33 samples (6 shards skipped: their index is current)\n"
    assert totals(shards, "--force") == first


def test_only_what_is_missing_older_or_damaged_is_read_again(shards: Path) -> None:
    totals(shards)
    whole = indexes(shards)
    (shards / "00000.tar.idx").unlink()
    (shards / "00001.tar.idx").write_bytes(b"cut")
    write_tar(shards / "00002.tar", [member for i in range(9) for member in sample(i)])
    os.utime(shards / "00003.tar")  # written again with the same size
    assert totals(shards)["skipped"] == 2
    assert load_index(shards / "00002.tar", None).samples == 9
    now = indexes(shards)
    assert [name for name in sorted(whole) if now[name] != whole[name]] == ["00002.tar.idx", "00003.tar.idx"]
    assert totals(shards)["skipped"] == 6


def test_a_shard_that_cannot_be_used_is_named_with_its_reason_and_the_others_go_on(shards: Path) -> None:
    cut = shards / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:5000])
    result = index(shards, "--json", "--processes", 2)
    assert isinstance(result.exception, DataError) and "1 of 6 shards cannot be used" in str(result.exception)
    reason = f"shard {cut}: truncated at byte 5000; copy or write it again"
    found = json.loads(result.stdout)
    assert found["unusable"] == [{"shard": str(cut), "reason": reason}] and found["samples"] == 29
    assert reason in result.stderr and len(indexes(shards)) == 5


def test_lost_samples_are_named_once_and_a_long_list_is_cut(shards: Path) -> None:
    write_tar(shards / "00005.tar", [*sample(0), *((f"alone-{n:02d}.jpg", b"1") for n in range(25))])
    said = index(shards).stderr
    assert f"shard {shards}/00002.tar: 1 samples lost (x: no caption)\n" in said
    assert f"shard {shards}/00003.tar: 1 samples lost (00300: twice)\n" in said
    assert "25 samples lost (alone-00: no caption; " in said and "alone-10" not in said
    assert "; and 15 more, which its index names)" in said
    assert "lost" not in index(shards).stderr


def test_a_dry_run_says_what_would_be_read_and_writes_nothing(shards: Path, tmp_path: Path) -> None:
    result = index(shards, "--dry-run", "--out", tmp_path / "new")
    assert result.output == f"6 of 6 shards would be read and their indexes written in {tmp_path}/new\n"
    assert not (tmp_path / "new").exists() and not indexes(shards)
    totals(shards)
    (shards / "00004.tar.idx").unlink()
    assert json.loads(index(shards, "--dry-run", "--json").stdout) == {"shards": 6, "skipped": 5, "dry_run": True}
    assert "6 of 6 shards would be read" in index(shards, "--dry-run", "--force").output
    assert len(indexes(shards)) == 5


def test_a_folder_that_cannot_be_written_ends_the_run_with_the_remedy(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = index(shards, "--out", tmp_path / "file" / "below", "--processes", 2)
    assert isinstance(result.exception, DataError) and "choose a folder that can" in str(result.exception)


def test_settings_of_a_cluster_that_is_not_used_are_refused(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("jobqueue: {slurm: {cores: 1, memory: 1GB}}")
    for arguments in ([], ["--cluster", "tcp://127.0.0.1:1"]):
        result = index(shards, "--cluster-config", tmp_path / "cluster.yaml", *arguments)
        assert result.exit_code == 2 and "--cluster-config: only --cluster slurm has settings" in result.output
    assert not indexes(shards)
