"""Make RUN/report.html, which shows on one page what a run did, from the files of the run alone."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.config import Config, load_config
from megamoe.core.errors import UserError
from megamoe.core.run_folder import RunFolder
from megamoe.metrics.metrics_file import read_metrics
from megamoe.metrics.step_record import StepRecord
from megamoe.model.size import model_size
from megamoe.parallel.layout import plan_layout
from megamoe.report.figures import Array, curves, expert_heat_map
from megamoe.report.html_page import Chart, Fact, render_page

LAST = 50  # number of last records over which the load and the final figures are averaged


@dataclass(frozen=True)
class Sample:
    """A held-out picture with its true caption; the generated one is a list of (word, differs from the true one)."""

    id: str
    image: str
    caption: str
    generated: list[tuple[str, bool]]
    match: bool


@dataclass(frozen=True)
class Split:
    """A held-out set: its figures and some of its samples."""

    name: str
    facts: list[Fact]
    samples: list[Sample]


def write_report(run: Path) -> Path:
    """Write RUN/report.html from metrics.jsonl and, if they exist, config.yaml, eval.json and eval/*.jsonl.

    Returns:
        Path of the page. It is self-contained: it loads no script, font or picture.

    Raises:
        UserError: RUN has no metrics.jsonl, it has no step, or a file of the evaluation is damaged.
    """
    records = read_metrics(run)
    if not records:
        raise UserError(f"{RunFolder(run).metrics}: has no step yet; report on the run after its first step")
    config, problem = _config(run)
    splits = _splits(run)
    html = render_page(
        "megamoe.report",
        "run.html",
        name=config.run.name if config else run.resolve().name,
        tiles=_tiles(records, splits, config),
        facts=_facts(records, config),
        problem=problem,
        charts=_charts(records),
        load_charts=_load_charts(records),
        splits=splits,
        settings=RunFolder(run).config.read_text(encoding="utf-8") if config else "",
    )
    path = RunFolder(run).report
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)
    return path


def _config(run: Path) -> tuple[Config | None, str]:
    path = RunFolder(run).config
    if not path.exists():
        return None, ""
    try:
        return load_config(path), ""
    except UserError as error:  # written by another version; the curves can still be shown
        return None, str(error)


def _tiles(records: Sequence[StepRecord], splits: Sequence[Split], config: Config | None) -> list[Fact]:
    tiles = [("steps", f"{records[-1]['step']:,}"), ("language loss", _number(_end(records, "lm_loss")))]
    tiles += [(f"{label}, {split.name}", text) for split in splits for label, text in split.facts if "match" in label]
    if config:
        size = model_size(config)
        tiles += [("parameters", _short(size.parameters)), ("active per token", _short(size.active_parameters))]
    tiles.append(("tokens per second", _short(_end(records, "tokens_per_second"))))
    return tiles


def _facts(records: Sequence[StepRecord], config: Config | None) -> list[Fact]:
    last = records[-1]
    worlds = [int(size) for size in _column(records, "world_size") if math.isfinite(size)]
    changes = [size for index, size in enumerate(worlds) if index == 0 or size != worlds[index - 1]]
    seconds = float(np.nansum(_column(records, "step_seconds")))
    facts = [
        ("ranks", " → ".join(map(str, changes)) or "unknown"),
        ("tokens", _short(last.get("tokens"))),
        ("samples", _short(last.get("samples"))),
        ("samples that could not be read", f"{last.get('lost', 0):,}"),
        ("time in steps", f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"),
    ]
    if config and worlds:
        try:
            facts.insert(0, ("layout", plan_layout(config, world_size=worlds[-1]).describe()))
        except UserError as error:  # config.yaml has another layout than the run had
            facts.insert(0, ("layout", str(error)))
    return facts


def _charts(records: Sequence[StepRecord]) -> list[Chart]:
    steps = _column(records, "step")
    wanted: list[tuple[str, str, dict[str, str], bool]] = [
        ("Loss", "Mean over the global batch; total is language model plus router losses.",
         {"language model": "lm_loss", "total": "loss"}, False),
        ("Load-balancing loss", "Falls and stays low when tokens spread over the experts.",
         {"aux": "aux_loss"}, False),
        ("Router z-loss", "Grows when router logits grow; a rise here comes before instability.",
         {"z": "z_loss"}, False),
        ("Gradient norm", "Before clipping, logarithmic. Spikes are batches to look at.",
         {"norm": "grad_norm"}, True),
        ("Learning rate", "Warm-up and decay as the optimizer had them.", {"rate": "lr"}, False),
        ("Tokens per second", "Over all ranks. Dips are restarts, checkpoints or waiting for data.",
         {"tokens/s": "tokens_per_second"}, False),
    ]  # fmt: skip
    charts = []
    for title, hint, keys, log in wanted:
        series = {label: _column(records, key) for label, key in keys.items()}
        series = {label: values for label, values in series.items() if np.isfinite(values).any()}
        if series:
            charts.append(Chart(title, hint, curves(steps, series, log=log, raw=title != "Learning rate")))
    return charts


def _load_charts(records: Sequence[StepRecord]) -> list[Chart]:
    with_load = [record for record in records if record.get("load")]
    if not with_load:
        return []
    layers = list(with_load[-1]["load"])
    tail = with_load[-LAST:]
    end = {layer: np.mean([_row(record, layer) for record in tail if layer in record["load"]], axis=0) for layer in layers}
    # 1 is perfect; E means that one expert got everything.
    worst = [[_row(record, layer).max() * len(record["load"][layer]) for layer in record["load"]] for record in with_load]
    balance = {
        "worst layer": np.array([max(row) for row in worst]),
        "mean of layers": np.array([float(np.mean(row)) for row in worst]),
    }
    return [
        Chart(
            "Load at the end",
            f"Tokens of each expert relative to its layer's mean, over the last {len(tail)} steps.",
            expert_heat_map(end),
            wide=True,
        ),
        Chart(
            "Balance",
            "Load of the busiest expert relative to the mean; 1 is perfect balance.",
            curves(_column(with_load, "step"), balance),
        ),
    ]


def _splits(run: Path) -> list[Split]:
    figures: dict[str, Mapping[str, Any]] = {}
    path = RunFolder(run).results
    if path.exists():
        result = _json(path, path.read_text(encoding="utf-8"))
        if "exact_match" in result:
            figures[str(result.get("name", "validation"))] = result
        figures.update(result.get("splits", {}))
    shown = {path.stem: path for path in sorted(RunFolder(run).captions.glob("*.jsonl"))}
    splits = []
    for name in [*figures, *(name for name in shown if name not in figures)]:
        lines = shown[name].read_text(encoding="utf-8").splitlines() if name in shown else []
        samples = [_sample(_json(shown[name], line)) for line in lines if line.strip()]
        splits.append(Split(name, _split_facts(figures.get(name, {})), samples))
    return splits


def _split_facts(result: Mapping[str, Any]) -> list[Fact]:
    facts = []
    if "exact_match" in result:
        facts.append(("exact match", f"{result['exact_match']:.1%}"))
    if result.get("loss") is not None:
        facts.append(("loss", _number(float(result["loss"]))))
    if "samples" in result:
        facts.append(("samples", f"{result['samples']:,}"))
    return facts


def _sample(record: Mapping[str, Any]) -> Sample:
    true, generated = str(record["caption"]).split(), str(record["generated"]).split()
    words = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, true, generated, autojunk=False).get_opcodes():
        words += [(word, kind != "equal") for word in generated[start:end]]
    return Sample(str(record["id"]), str(record["image"]), str(record["caption"]), words, bool(record["match"]))


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); run `megamoe eval` again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; run `megamoe eval` again")
    return value


def _column(records: Sequence[StepRecord], key: str) -> Array:
    """Return the values of ``key``, NaN where a record has none."""
    values = [record.get(key) for record in records]
    return np.array([float(value) if isinstance(value, int | float) else np.nan for value in values])


def _row(record: StepRecord, layer: str) -> Array:
    return np.array(record["load"][layer], dtype=np.float64)


def _end(records: Sequence[StepRecord], key: str) -> float:
    values = _column(records[-LAST:], key)
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _short(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "unknown"
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= limit:
            scaled = value / limit * (10 if limit == 1e4 else 1)
            return f"{scaled:.3g}{unit}"
    return f"{value:,.0f}"
