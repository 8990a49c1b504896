"""The schema of metrics.jsonl: its contract, the check on reading, and the last step read from the end of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megamoe.core.errors import UserError
from megamoe.metrics import MetricsWriter, read_metrics
from megamoe.metrics.metrics_file import last_step
from megamoe.metrics.step_record import StepRecord, parse_record
from megamoe.metrics.tensorboard import SCALARS

CONTRACT = (
    "step loss lm_loss aux_loss z_loss grad_norm lr tokens samples lost bad_shards truncated recomputed skipped spikes "
    "rolled_back step_seconds data_seconds tokens_per_second model_flops_per_second world_size load sources reading"
)


def test_the_keys_and_their_order_are_the_contract() -> None:
    assert list(StepRecord.__annotations__) == CONTRACT.split()
    assert SCALARS.keys() <= set(CONTRACT.split())
    assert all(f"        {key}: " in (StepRecord.__doc__ or "") for key in CONTRACT.split()), "each key is documented"


def test_a_line_of_an_older_or_newer_version_is_read() -> None:
    assert parse_record({"step": 3}) == {"step": 3}
    record = {"loss": None, "step": 1, "lr": 0, "load": {"a": [0.5, None]}, "a key to come": "?", "reading": {"retries": 0}}
    assert parse_record(record) == record, "in any order, with nulls"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": 1.5}, "step"),
        ({"step": True}, "step"),
        ({"loss": "2.0"}, "loss"),
        ({"tokens": None}, "tokens"),
        ({"load": [1.0]}, "load"),
        ({"load": {"a": 1.0}}, "load"),
        ({"load": {"a": ["x"]}}, "load"),
        ({"sources": {"a": 1}}, "sources"),
        ({"reading": {"seconds": []}}, "reading"),
    ],
)
def test_a_value_of_another_type_is_named(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=named):
        parse_record({"step": 1, **change})


def test_a_line_of_another_type_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step":1}\n{"step":2,"loss":"high"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2: loss .*remove that line"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("what", [[], 1, None, "step", {}])
def test_what_is_no_record_is_refused(what: object) -> None:
    with pytest.raises(TypeError):
        parse_record(what)


def test_the_last_step_is_read_from_the_end_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    assert last_step(path) == 0
    with MetricsWriter(tmp_path, None) as writer:
        for step in range(1, 300):
            writer.write({"step": step, "load": {"a": [0.125] * 1000}})
    assert path.stat().st_size > 1 << 20 and last_step(path) == 299
    with path.open("a") as file:
        file.write('{"loss": 2.0, "step": 300}\n{"step": 301, "lo')
    assert last_step(path) == 300, "wherever the key stands; a line under way is none"
