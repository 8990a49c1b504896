"""Promise 3 on a few pairs of the matrix; `python -m benchmarks.resume_matrix` runs all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.resume_matrix import LAYOUTS, Pair, measure, prepare, write_page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the runs of this module."""
    path = tmp_path_factory.mktemp("matrix")
    prepare(path)
    return path


@pytest.mark.parametrize("resumed", ["pipeline 2", "ZeRO-3 x expert 2"])
def test_saved_by_zero_3_and_gone_on_from_under(resumed: str, folder: Path) -> None:
    pair = measure(folder, "sgd", "ZeRO-3 x expert 2", resumed)
    assert pair.good, pair
    assert pair.exact is (True if resumed == "ZeRO-3 x expert 2" else None)


def test_the_page_shows_what_is_out_of_bounds_and_what_was_not_run(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    assert not Pair(0.0, "", same_samples=False, exact=None).good and not Pair(0.0, "", True, exact=False).good
    for name, difference in (("sgd-1x1x1-pipeline2", "2e-5"), ("sgd-1x1x1-expert2", "3e-7")):
        content = f'{{"difference": {difference}, "where": "", "same_samples": true, "exact": null}}'
        (tmp_path / f"pairs/{name}.json").write_text(content)
    write_page(tmp_path, tmp_path / "page.md")
    row = next(line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| 1x1x1"))
    assert row.split(" | ")[1:4] == ["·", "**2.0e-05**", "3.0e-07"] and row.count("·") == len(LAYOUTS) - 2
