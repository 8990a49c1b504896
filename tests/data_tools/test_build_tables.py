"""`megamoe data build` from CSV, TSV, JSONL and parquet: columns, rows at shard borders, paths that lead outside."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.sources.columns import Names
from data_tools.sources.detect import open_source
from megamoe.core.errors import DataError
from megamoe.data.shards.index import build_index, learn_index
from tests.data.shard_factory import jpeg
from tests.data_tools.build_kit import build, members, metadata, rows, stats


def table(folder: Path, count: int, caption: str = "TEXT") -> list[dict[str, Any]]:
    """Make pictures in ``folder``, and rows for them."""
    (folder / "images").mkdir(parents=True)
    for n in range(count):
        (folder / f"images/{n}.jpg").write_bytes(jpeg(n))
    return [
        {"image": f"images/{n}.jpg", caption: f'no. {n}, "big"\nand round', "similarity": n / 8, "id": f"0{n}", "n": n}
        for n in range(count)
    ]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path, row_group_size=4)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in content))
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(content[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(content)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_row_becomes_a_sample_with_all_its_columns(tmp_path: Path, kind: str) -> None:
    content = table(tmp_path, 11)
    result = build(write(tmp_path / f"t.{kind}", content), tmp_path / "out", "--shard-size", 3)
    assert result.exit_code == 0, result.output
    found = metadata(tmp_path / "out")
    expected = [{"caption" if name == "TEXT" else name: value for name, value in row.items()} for row in content]
    assert [{name: sample[name] for name in expected[0]} for sample in found] == expected
    assert [sample["key"] for sample in found] == [f"{n // 3:05d}{n % 3}" for n in range(11)]
    assert members(tmp_path / "out")["000031.jpg"] == jpeg(10)
    assert [row["sha256"] for row in rows(tmp_path / "out")] == [sample["sha256"] for sample in found]
    assert [each["successes"] for each in stats(tmp_path / "out")] == [3, 3, 3, 2]


def test_a_folder_of_img2dataset_names_is_indexed_with_its_numeric_keys(tmp_path: Path) -> None:
    assert build(write(tmp_path / "t.csv", table(tmp_path, 5)), tmp_path / "out", "--shard-size", 3).exit_code == 0
    shards = sorted((tmp_path / "out").glob("*.tar"))
    for shard in shards:
        learn_index(shard, None)
    assert [build_index(shard).key(0) for shard in shards] == ["000000", "000010"]


fields = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(fields, fields), min_size=1, max_size=20), st.integers(1, 7), st.sampled_from(["csv", "tsv"]))
def test_rows_at_shard_borders_are_read_as_a_whole_table_is(content: list[tuple[str, str]], size: int, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t.{kind}"
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerows([("url", "caption", "x"), *((f"http://h/{n}", *row) for n, row in enumerate(content))])
        source = open_source(path, size, Names())
        assert [chunk.samples for chunk in source.chunks][:-1] == [size] * (len(source.chunks) - 1)
        items = [item for chunk in source.chunks for item in chunk.items()]
    assert [item.picture for item in items] == [f"http://h/{n}" for n in range(len(content))]
    assert [item.caption or "" for item in items] == [caption.strip() for caption, _ in content]


def test_a_quote_that_is_never_closed_does_not_swallow_the_rest(tmp_path: Path) -> None:
    lines = ["image,caption", "a.jpg,fine", 'b.jpg,"open', *(f"{n}.jpg,x" for n in range(50))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    error = build(tmp_path / "t.csv", tmp_path / "out").exception
    assert isinstance(error, DataError) and "t.csv: line 53: unexpected end of data; quote fields" in str(error)


def test_rows_that_are_no_rows_are_counted_and_named(tmp_path: Path) -> None:
    table(tmp_path, 2)
    good = [json.dumps({"image": f"images/{n}.jpg", "caption": "x"}) for n in range(2)]
    deep = "[" * 100_000
    bad = ["{", "[1]", deep, '{"image": "images/0.jpg", "caption": 3}', '{"caption": "x"}', '{"image": 5, "caption": "x"}']
    (tmp_path / "t.jsonl").write_bytes("\n".join([*good, *bad]).encode() + b'\n{"image": "\xff"}')
    assert build(tmp_path / "t.jsonl", tmp_path / "out").exit_code == 1
    (totals,) = stats(tmp_path / "out")
    assert (totals["count"], totals["successes"], totals["no_caption"]) == (9, 2, 1)
    messages = [row["error_message"] for row in rows(tmp_path / "out")][2:]
    assert messages[0] == "t.jsonl row 3: row: no JSON object" and messages[-1] == "t.jsonl row 9: row: not UTF-8"
    (tmp_path / "t.csv").write_text("image,caption\nimages/0.jpg,x,y\nimages/1.jpg,x\n")
    assert build(tmp_path / "t.csv", tmp_path / "csv").exit_code == 1
    assert rows(tmp_path / "csv")[0]["error_message"] == "t.csv row 1: row: 3 fields where the header has 2"


def test_a_table_cannot_make_us_read_what_lies_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    table(tmp_path / "in", 1)
    os.mkfifo(tmp_path / "in/pipe.jpg")
    paths = [
        "../secret.jpg",
        tmp_path / "secret.jpg",
        "images/../../secret.jpg",
        "http://h/a.jpg",
        "pipe.jpg",
        "gone.jpg",
        "",
    ]
    inside = ["images/0.jpg", tmp_path / "in/images/0.jpg"]
    lines = [json.dumps({"image": str(path), "caption": "x"}) for path in (*paths, *inside)]
    (tmp_path / "in/t.jsonl").write_text("\n".join(lines))
    assert build(tmp_path / "in/t.jsonl", tmp_path / "out").exit_code == 1
    found = rows(tmp_path / "out")
    assert [row["status"] for row in found] == ["failed_to_download"] * 7 + ["success"] * 2
    assert "name the folder with --image-root" in found[0]["error_message"]
    assert stats(tmp_path / "out")[0]["status_dict"]["outside of the folder of pictures"] == 3
    result = build(tmp_path / "in/t.jsonl", tmp_path / "wide", "--image-root", tmp_path, "--json")
    assert json.loads(result.stdout)["successes"] == 2  # secret.jpg in the root, by two of its names


def test_columns_are_found_by_name_or_said(tmp_path: Path) -> None:
    content = table(tmp_path, 2, "Title")
    path = write(
        tmp_path / "t.csv", [{"caption_de": f"Bild {n}", "URL": "http://h/x", **row} for n, row in enumerate(content)]
    )
    assert build(path, tmp_path / "a", "--caption-col", "caption_de").exit_code == 0
    first = metadata(tmp_path / "a")[0]
    assert first["caption"] == "Bild 0" and first["Title"].startswith("no. 0") and first["URL"] == "http://h/x"
    said = build(path, tmp_path / "b", "--dry-run")
    assert "pictures from column 'image', captions from column 'Title'" in said.output
    said = build(path, tmp_path / "b", "--dry-run", "--url-col", "URL")
    assert "URLs from column 'URL'" in said.output
    wrong = build(path, tmp_path / "b", "--caption-col", "Text")
    assert "has no column 'Text' (--caption-col); its columns: caption_de, URL, image, Title" in str(wrong.exception)
    (tmp_path / "t.tsv").write_text("image\tsize\n1.jpg\t3\n")
    assert "no column of captions; name it with --caption-col" in str(build(tmp_path / "t.tsv", tmp_path / "b").exception)
    (tmp_path / "u.csv").write_text("caption,caption,url\n")
    assert "column 'caption' repeats" in str(build(tmp_path / "u.csv", tmp_path / "b").exception)


def test_parquet_with_pictures_inside_as_hugging_face_writes_it(tmp_path: Path) -> None:
    content = [
        {
            "image": {"bytes": jpeg(n), "path": f"{n}.jpg"},
            "text": f"no. {n}",
            "day": date(2024, 1, 2),
            "boxes": [[n, 1.5], []],
        }
        for n in range(7)
    ]
    assert build(write(tmp_path / "t.parquet", content), tmp_path / "out", "--shard-size", 3).exit_code == 0
    found = metadata(tmp_path / "out")
    assert [(row["image"], row["caption"], row["day"]) for row in found] == [
        (f"{n}.jpg", f"no. {n}", "2024-01-02") for n in range(7)
    ]
    assert members(tmp_path / "out")["000020.jpg"] == jpeg(6) and found[6]["boxes"] == [[6.0, 1.5], []]
    assert json.loads(rows(tmp_path / "out")[6]["boxes"]) == [[6.0, 1.5], []]


def test_a_folder_of_tables_is_read_in_order(tmp_path: Path) -> None:
    content = table(tmp_path / "pictures", 6)
    (tmp_path / "in").mkdir()
    for n in range(2):
        write(tmp_path / f"in/part-{n}.parquet", content[3 * n : 3 * n + 3])
    options = ("--image-root", tmp_path / "pictures", "--shard-size", 2)
    assert build(tmp_path / "in", tmp_path / "out", *options).exit_code == 0
    assert [row["n"] for row in metadata(tmp_path / "out")] == list(range(6))
    assert [each["count"] for each in stats(tmp_path / "out")] == [2, 1, 2, 1]  # no shard is of two tables


def test_mixed_columns_and_odd_values_reach_json_and_parquet(tmp_path: Path) -> None:
    table(tmp_path, 3)
    odd: list[object] = [1, "two", {"three": float("inf")}]
    lines = [json.dumps({"image": f"images/{n}.jpg", "caption": "x", "odd": odd[n], "big": 10**30}) for n in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines).replace('"two"', '"two\\ud800"'))
    assert build(tmp_path / "t.jsonl", tmp_path / "out").exit_code == 0
    assert [row["odd"] for row in metadata(tmp_path / "out")] == [1, "two?", {"three": None}]
    assert [json.loads(row["odd"]) for row in rows(tmp_path / "out")] == [1, "two?", {"three": None}]


def test_what_is_no_table_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not at all")
    assert "t.parquet: cannot be read as parquet" in str(build(tmp_path / "t.parquet", tmp_path / "o").exception)
    (tmp_path / "t.csv.gz").write_bytes(b"\x1f\x8b")
    assert "give --input-format csv|tsv|jsonl|parquet|txt" in str(build(tmp_path / "t.csv.gz", tmp_path / "o").exception)
    (tmp_path / "t.jsonl").write_text("[\n{}\n]")
    assert "JSONL is one object per line" in str(build(tmp_path / "t.jsonl", tmp_path / "o").exception)
    (tmp_path / "e.csv").write_text("image,caption\n")
    assert "e.csv: holds no sample" in str(build(tmp_path / "e.csv", tmp_path / "o").exception)
    (tmp_path / "long.jsonl").write_bytes(b'{"caption": "' + b"x" * (17 << 20))
    assert "a line of more than" in str(build(tmp_path / "long.jsonl", tmp_path / "o").exception)
    assert not (tmp_path / "o").exists()


def test_a_damaged_parquet_is_an_error_and_not_fewer_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", [{"image": jpeg(n), "caption": "x"} for n in range(40)])
    at = pq.read_metadata(path).row_group(5).column(0).dictionary_page_offset
    raw = bytearray(path.read_bytes())
    raw[at : at + 16] = b"\xff" * 16
    path.write_bytes(raw)
    result = build(path, tmp_path / "out")
    assert isinstance(result.exception, DataError) and "t.parquet: cannot be read as parquet" in str(result.exception)
    assert not list((tmp_path / "out").glob("*_stats.json")) and not list((tmp_path / "out").glob("*.tar"))
