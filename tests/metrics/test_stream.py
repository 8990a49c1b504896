"""metrics.jsonl and the audit: strict JSON, each step once, also after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamoe.core.errors import UserError
from megamoe.metrics import AuditWriter, MetricsWriter, read_metrics, truncate_audit
from megamoe.metrics.jsonl import to_line


def write_steps(run: Path, steps: range, resume: int | None = None) -> None:
    with MetricsWriter(run, resume) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 1 / step})


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    record = {"step": 1, "loss": 2.5, "lost": 0, "load": {"decoder.blocks.0": [0.25, 0.75]}}
    with MetricsWriter(tmp_path / "run", None) as writer:
        writer.write(record)
        assert read_metrics(tmp_path / "run") == [record], "a line is on disk when write returns"


def test_tensors_and_arrays_become_numbers_and_lists(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, None) as writer:
        writer.write({"step": 1, "loss": torch.tensor(2.0), "lr": np.float32(0.5), "load": {"a": torch.ones(2)}})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0, "lr": 0.5, "load": {"a": [1.0, 1.0]}}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("nan")), np.float64("-inf")])
def test_what_is_not_finite_is_written_as_null(value: object) -> None:
    line = to_line({"step": 1, "loss": value, "load": {"a": [value]}})
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "load": {"a": [None]}}


@given(steps=st.integers(0, 12), resume=st.integers(0, 14), torn=st.binary(max_size=20).filter(lambda b: b"\n" not in b))
def test_resume_keeps_exactly_the_complete_lines_up_to_its_step(
    steps: int, resume: int, torn: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    write_steps(run, range(1, steps + 1))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    kept = min(steps, resume)
    with MetricsWriter(run, resume) as writer:
        assert [record["step"] for record in read_metrics(run)] == list(range(1, kept + 1))
        writer.write({"step": kept + 1})
    assert [record["step"] for record in read_metrics(run)] == list(range(1, kept + 2))
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl"]


def test_a_new_run_refuses_a_folder_that_has_metrics(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    with pytest.raises(UserError, match=r"run\.dir .* --resume auto"):
        MetricsWriter(tmp_path, None)
    assert len(read_metrics(tmp_path)) == 2


def test_a_new_run_may_use_a_folder_without_steps(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    write_steps(tmp_path, range(1, 3))
    assert len(read_metrics(tmp_path)) == 2


def test_a_run_that_died_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 5))
    write_steps(tmp_path, range(1, 3), resume=0)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_step_is_never_written_twice(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    with MetricsWriter(tmp_path, 3) as writer, pytest.raises(AssertionError):
        writer.write({"step": 3})


def test_a_damaged_line_is_named_and_the_file_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 .*remove that line"):
        MetricsWriter(tmp_path, 2)
    assert path.read_bytes().count(b"\n") == 3


def test_reading_a_folder_without_metrics_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_metrics(tmp_path)


def test_kill_9_in_the_middle_of_writing_loses_no_complete_step(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from itertools import count; from megamoe.metrics import MetricsWriter;"
        "writer = MetricsWriter(Path(sys.argv[1]), None);"
        "load = {'a': [0.5] * 500};"
        "[(writer.write({'step': s, 'load': load}), s == 50 and print('go', flush=True)) for s in count(1)]"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=_environment())
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    steps = [record["step"] for record in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 50
    write_steps(tmp_path, range(41, 44), resume=40)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 44))


def test_the_audit_has_a_line_per_sample_and_rank(tmp_path: Path) -> None:
    for rank in (0, 1):
        writer = AuditWriter(tmp_path, rank, enabled=True)
        writer.write(1, [(rank, f"00000.tar#{rank}"), (rank + 2, "a/ü.tar#x")])
        writer.close()
    lines = (tmp_path / "audit/rank-00001.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "slot": 1, "id": "00000.tar#1"},
        {"step": 1, "slot": 3, "id": "a/ü.tar#x"},
    ]


def test_an_audit_that_is_off_leaves_no_trace(tmp_path: Path) -> None:
    writer = AuditWriter(tmp_path, 0, enabled=False)
    writer.write(1, [(0, "a#b")])
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_resume_cuts_the_audit_of_every_rank_that_ever_wrote(tmp_path: Path) -> None:
    for rank in range(3):
        writer = AuditWriter(tmp_path, rank, enabled=True)
        for step in range(1, 6):
            writer.write(step, [(slot, f"{step}#{slot}") for slot in range(rank, 6, 3)])
        writer.close()
    with (tmp_path / "audit/rank-00002.jsonl").open("ab") as file:
        file.write(b'{"step":6,"sl')
    truncate_audit(tmp_path, 3)
    lines = [json.loads(line) for path in (tmp_path / "audit").iterdir() for line in path.read_text().splitlines()]
    assert sorted((line["step"], line["slot"]) for line in lines) == [(s, k) for s in (1, 2, 3) for k in range(6)]


def test_truncating_an_audit_that_was_never_written_is_fine(tmp_path: Path) -> None:
    truncate_audit(tmp_path, 3)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
