"""The frame of all HTML pages: one style, values escaped, and no value forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from data_tools.stats.shard_stats import Stats
from data_tools.stats.stats_page import render
from megamoe.report import write_report
from megamoe.report.html_page import render_page
from tests.report.test_page import make_run, record


def test_the_page_of_a_run_and_the_page_of_a_data_set_have_one_frame_and_style(tmp_path: Path) -> None:
    run = write_report(make_run(tmp_path, [record(1)])).read_text()
    data = render(Stats(), "shapes", sample=0)
    frame = run[: run.index("</style>")].split(".charts .wide")[0]
    assert "--series-1" in frame and ".tiles dd" in frame
    style = frame[frame.index("<style>") :]
    assert run.startswith("<!doctype html>\n") and data.startswith("<!doctype html>\n")
    assert (
        style in data and "<title>shapes - MegaMoE data</title>" in data and "<title>night-run - MegaMoE run</title>" in run
    )


def test_values_are_escaped_and_none_may_be_missing() -> None:
    values = {"charts": [], "load_charts": [], "splits": [], "settings": "", "problem": "<script>"}
    page = render_page("megamoe.report", "run.html", name="<b>", tiles=[("<i>", "1")], facts=[], **values)
    assert "<b>" not in page and "<i>" not in page and "&lt;b&gt;" in page and "&lt;script&gt;" in page
    del values["problem"]
    with pytest.raises(UndefinedError, match="problem"):
        render_page("megamoe.report", "run.html", name="a", tiles=[], facts=[], **values)
