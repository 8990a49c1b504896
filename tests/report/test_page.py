"""The HTML page of a run: complete, self-contained, and safe against what comes from shards."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megamoe.core.errors import UserError
from megamoe.report import write_report
from megamoe.report.figures import POINTS, _thin, smooth

CONFIG = """
run: {name: night-run}
model:
  vision: {image_size: 32, patch_size: 16, width: 32, depth: 2, heads: 2, mlp_width: 64, expert_width: 32}
  decoder: {vocab_size: 300, width: 32, depth: 2, heads: 2, kv_heads: 1, head_dim: 16, expert_width: 32}
parallel: {pipeline: 2}
"""


class Page(HTMLParser):
    """Collects the tags, addresses and visible text of a page, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def record(step: int, experts: int = 4, **changes: object) -> dict[str, object]:
    load = np.linspace(1, 2, experts) / np.linspace(1, 2, experts).sum()
    values: dict[str, object] = {
        "step": step,
        "loss": 3.0 / step,
        "lm_loss": 2.9 / step,
        "aux_loss": 0.01,
        "z_loss": 0.001,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": step * 1000,
        "samples": step * 10,
        "step_seconds": 0.5,
        "data_seconds": 0.0,
        "tokens_per_second": 2000.0,
        "model_flops_per_second": 1e9,
        "world_size": 4,
        "lost": 3,
        "load": {"decoder.blocks.0": load.tolist(), "vision.blocks.1": load.tolist()},
    }
    return {**values, **changes}


def make_run(folder: Path, records: list[dict[str, object]], config: str = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


def add_eval(run: Path, samples: list[dict[str, object]]) -> None:
    (run / "eval").mkdir()
    (run / "eval/validation.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (run / "eval/combinations.jsonl").write_text(json.dumps(samples[0]) + "\n")
    result = {"exact_match": 0.972, "loss": 0.05, "samples": 500, "name": "validation"}
    splits = {"combinations": {"exact_match": 0.75, "loss": 0.2, "samples": 200}}
    (run / "eval.json").write_text(json.dumps({**result, "splits": splits}))


def sample(caption: str, generated: str, name: str = "00000.tar#7") -> dict[str, object]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    return {"id": name, "caption": caption, "generated": generated, "match": caption == generated, "image": image}


def test_a_whole_run_is_on_one_page_that_loads_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(step) for step in range(1, 301)])
    add_eval(run, [sample("a red circle", "a red circle"), sample("a red circle", "a blue circle")])
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    for word in ("night-run", "97.2%", "75.0%", "pipeline 2 x data 2", "300", "Load-balancing loss", "Load at the end"):
        assert word in page.text, word
    assert page.tags.count("svg") == 8 and page.tags.count("img") == 3
    assert page.text.count("✗ wrong") == 1 and "<mark>blue</mark>" in page.html
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert "script" not in page.tags and not re.search(r"https?://|@import|url\((?!#)", page.html)
    assert [item.name for item in run.iterdir() if item.name.endswith(".tmp")] == []


def test_ids_of_the_figures_do_not_clash(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path, [record(step) for step in range(1, 50)])).read_text()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_text_from_shards_is_shown_not_executed(tmp_path: Path) -> None:
    run = make_run(tmp_path, [record(1)])
    attack = '<script>alert(1)</script> "><img src=x onerror=alert(2)>'
    add_eval(run, [sample(attack, attack.replace("1", "3"), name=attack)])
    page = Page(write_report(run))
    assert "script" not in page.tags and page.tags.count("img") == 2
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_run_of_few_steps_without_config_or_eval_gives_a_page(steps: int, tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "short", [record(s) for s in range(1, steps + 1)], config="")))
    assert "short" in page.text and "svg" in page.tags and "img" not in page.tags


def test_nulls_missing_keys_and_no_experts_give_a_page(tmp_path: Path) -> None:
    records = [record(1, loss=None, lm_loss=None, grad_norm=None, load={}), {"step": 2}]
    page = Page(write_report(make_run(tmp_path, records)))
    assert "not finite" in page.text and "Load at the end" not in page.text


def test_a_torn_last_line_of_a_run_in_progress_is_ignored(tmp_path: Path) -> None:
    run = make_run(tmp_path, [record(1), record(2)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert re.search(r"steps\s*2\b", Page(write_report(run)).text)


def test_many_experts_and_layers_keep_the_page_small(tmp_path: Path) -> None:
    layers = {f"decoder.blocks.{i}": [1 / 128] * 128 for i in range(48)}
    path = write_report(make_run(tmp_path, [record(step, load=layers) for step in range(1, 4)]))
    assert path.stat().st_size < 400_000


def test_a_change_of_the_number_of_ranks_is_told(tmp_path: Path) -> None:
    records = [record(step, world_size=4 if step < 5 else 2) for step in range(1, 9)]
    assert "4 → 2" in Page(write_report(make_run(tmp_path, records))).text


def test_a_config_of_another_version_costs_only_what_needs_it(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path, [record(1)], config="train: {stepz: 3}")))
    assert "unknown key train.stepz" in page.text and "svg" in page.tags


def test_a_folder_without_metrics_or_steps_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no step yet"):
        write_report(tmp_path)


def test_a_run_that_was_evaluated_on_another_split_only_shows_that_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, [record(1)])
    (run / "eval.json").write_text('{"splits": {"combinations": {"exact_match": 0.5, "loss": 1.0, "samples": 2}}}')
    text = Page(write_report(run)).text
    assert "Held-out pictures: combinations" in text and "Held-out pictures: validation" not in text


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, [record(1)])
    (run / "eval.json").write_text("{")
    with pytest.raises(UserError, match=r"eval\.json: is damaged .*`megamoe eval` again"):
        write_report(run)


def test_a_spike_survives_the_thinning_of_a_long_curve() -> None:
    steps, values = np.arange(100_000.0), np.ones(100_000)
    values[77_777], values[5] = 50.0, np.nan
    kept_steps, kept = _thin(steps, values)
    assert len(kept) <= POINTS and kept.max() == 50.0 and 77_777 in kept_steps
    assert np.isfinite(kept).all() and (np.diff(kept_steps) > 0).all()


def test_the_running_mean_does_not_lag_and_leaves_out_nan() -> None:
    slope = np.arange(1000.0)
    assert smooth(slope)[:900] == pytest.approx(slope[:900])
    gap = np.ones(1000)
    gap[500] = np.nan
    assert smooth(gap) == pytest.approx(np.ones(1000))
