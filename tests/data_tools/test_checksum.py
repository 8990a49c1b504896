"""`megamoe data checksum`: coreutils read what it writes, and it reads what they write."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import data_tools.verbs.checksum
from megamoe.commands.data.group import data
from megamoe.core.errors import DataError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(data, ["checksum", *(str(each) for each in arguments), "--processes", "1"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make three files named like shards; their content does not matter here."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number:05d}.tar").write_bytes(bytes([number]) * 5000)
    return folder


def coreutils(folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_coreutils_reads_what_was_written(folder: Path) -> None:
    (folder / "odd \\ na\nme.tar").write_bytes(b"x")
    (folder / "\xe4 b.tar").write_bytes(b"y")
    assert run(folder, "--write").exit_code == 0
    result = coreutils(folder)
    assert result.returncode == 0 and result.stdout.count(": OK") == 5, result
    assert run(folder, "--verify").stdout == "5 of 5 shards are right\n"
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".tar") == ["SHA256SUMS"]


def test_what_coreutils_wrote_is_verified(folder: Path) -> None:
    text = subprocess.run("sha256sum --binary ./*.tar", shell=True, cwd=folder, capture_output=True, check=True).stdout
    (folder / "SHA256SUMS").write_bytes(text)
    assert run(folder, "--verify").exit_code == 0


def test_sums_are_printed_as_sha256sum_prints_them(folder: Path) -> None:
    shards = [str(folder / f"{number:05d}.tar") for number in range(3)]
    assert run(folder).stdout == subprocess.run(["sha256sum", *shards], capture_output=True, text=True, check=True).stdout
    assert json.loads(run(folder, "--json").stdout)[shards[0]] == hashlib.sha256(bytes(5000)).hexdigest()
    assert not (folder / "SHA256SUMS").exists()


def test_shards_that_differ_are_missing_or_have_no_sum_are_named(folder: Path) -> None:
    run(folder, "--write")
    with open(folder / "00001.tar", "r+b") as file:
        file.seek(4000)
        file.write(b"!")
    (folder / "00002.tar").rename(folder / "00003.tar")
    result = run(folder, "--verify")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{folder}/00001.tar: DIFFERS",
        f"{folder}/00002.tar: MISSING",
        f"{folder}/00003.tar: has no sum",
        "1 of 3 shards are right",
    ]
    report = json.loads(run(folder, "--verify", "--json").stdout)
    assert report["differ"] == [f"{folder}/00001.tar"] and report["right"] == 1


def test_each_folder_gets_its_own_file_and_other_lines_stay(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "00000.tar").write_bytes(b"z")
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(b'').hexdigest()}  notes.txt\n")
    (folder / "notes.txt").write_bytes(b"")
    assert run(f"{folder}::{other}", "--write").exit_code == 0
    assert coreutils(folder).stdout.count("OK") == 4 and coreutils(other).returncode == 0
    assert "; 1 other listed files were not read" in run(folder, "--verify").stdout


def test_a_sum_that_changed_is_said_so(folder: Path) -> None:
    run(folder, "--write")
    (folder / "00001.tar").write_bytes(b"new")
    result = run(folder, "--write")
    assert result.exit_code == 0 and f"{folder}/00001.tar: its sum differs from the one" in result.stdout


def test_a_run_that_was_stopped_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = data_tools.verbs.checksum._digest

    def stopping(shard: Path) -> str | None:
        if shard.name == "00002.tar" and not read.count(shard.name):
            read.append(shard.name)
            raise KeyboardInterrupt
        read.append(shard.name)
        return digest(shard)

    monkeypatch.setattr(data_tools.verbs.checksum, "_digest", stopping)
    assert run(folder, "--write").exit_code != 0 and not (folder / "SHA256SUMS").exists()
    with open(folder / ".SHA256SUMS.partial", "a") as journal:
        journal.write('["00002.tar", 50')  # the line at which the power went
    (folder / "00001.tar").write_bytes(b"changed meanwhile")
    read.clear()
    read.append("00002.tar")
    result = run(folder, "--write")
    assert result.exit_code == 0 and read == ["00002.tar", "00001.tar", "00002.tar"]
    assert "3 shards, 1 of them by an earlier run" in result.stdout
    assert coreutils(folder).returncode == 0 and not (folder / ".SHA256SUMS.partial").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rubbish\n", "line 1: is not `SHA256  NAME`"),
        (f"{'0' * 64}  ../../etc/passwd\n", "leads out of its folder"),
        (f"{'0' * 64}  /etc/passwd\n", "leads out of its folder"),
        ("", "no such file, or empty"),
    ],
)
def test_files_of_sums_that_cannot_be_trusted_are_refused(folder: Path, line: str, message: str) -> None:
    (folder / "SHA256SUMS").write_text(line)
    result = run(folder, "--verify")
    assert isinstance(result.exception, DataError) and message in str(result.exception)


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    result = run(folder, "--write", "--dry-run")
    assert result.exit_code == 0 and f"3 shards would be read; written: {folder}/SHA256SUMS" in result.stdout
    assert not (folder / "SHA256SUMS").exists()
