"""Tables of figures are Markdown that renders."""

from __future__ import annotations

from megamoe.bench.tables import table_head, table_row


def test_head_and_rows_have_as_many_columns() -> None:
    lines = [*table_head(["", "save (s)", "MB/s"]).splitlines(), table_row(["ours", "", "1,200"])]
    assert lines == ["| | save (s) | MB/s |", "| --- | --- | --- |", "| ours | | 1,200 |"]


def test_numbers_are_aligned_to_the_right_of_the_first_column() -> None:
    assert table_head(["layout", "a", "b"], numbers=True).splitlines()[1] == "| --- | ---: | ---: |"
