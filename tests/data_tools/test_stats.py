"""`megamoe data stats`: figures compared with NumPy over the same tars, and a page that is safe to open."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import megamoe.report.figures
from data_tools.stats import shard_stats as stats_module
from data_tools.stats.sketch import Sketch
from megamoe.commands.data.group import data
from megamoe.core.errors import DataError
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.sample.vocabulary import train_tokenizer
from tests.data.shard_factory import caption, write_tar

N = 120


def run(*arguments: object, processes: int = 1) -> Result:
    return CliRunner().invoke(data, ["stats", *(str(each) for each in arguments), "--processes", str(processes)])


def picture(width: int, height: int, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (width % 255, height % 255, 90)).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Make three shards of pictures of many sizes, and return what is in them."""
    folder, draw = tmp_path_factory.mktemp("set"), random.Random(1)
    truth: list[dict[str, Any]] = []
    for number in range(3):
        members = []
        for n in range(N * number, N * number + N):
            width, height = int(draw.lognormvariate(5, 0.6)) + 8, draw.randrange(20, 400)
            ext, kind = draw.choice([("jpg", "JPEG"), ("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
            image = picture(width, height, kind)
            columns = {"similarity": draw.gauss(0.3, 0.05), "punsafe": draw.betavariate(0.3, 5), "level": draw.randrange(4)}
            truth.append({"width": width, "height": height, "image_bytes": len(image), "kind": kind, "n": n, **columns})
            record = columns | {"caption": "not this one", "nsfw": True, "url": "http://x", "p": None}
            members += [
                (f"{n}.{ext}", image),
                (f"{n}.txt", caption(n).encode()),
                (f"{n}.json", json.dumps(record).encode()),
            ]
        write_tar(folder / f"{number:05d}.tar", members)
    return folder, truth


def test_figures_are_those_of_numpy(made: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, truth = made
    result = run(folder, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and (found["samples"], found["shards"]) == (3 * N, 3)
    assert found["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert list(found["json"]) == ["level", "punsafe", "similarity"]
    expected = {key: [each[key] for each in truth] for key in ("width", "height", "image_bytes")}
    expected["aspect"] = [each["width"] / each["height"] for each in truth]
    expected["caption_characters"] = [len(caption(each["n"])) for each in truth]
    for key in ("similarity", "punsafe", "level"):
        expected[key] = [each[key] for each in truth]
    for key, values in expected.items():
        figures = found[key] if key in found else found["json"][key]
        assert (figures["count"], figures["min"], figures["max"]) == (3 * N, min(values), max(values))
        assert figures["mean"] == pytest.approx(np.mean(values)) and figures["std"] == pytest.approx(np.std(values))
        for share in (1, 5, 25, 50, 75, 95, 99):
            exact = np.quantile(values, share / 100, method="lower")
            assert figures[f"p{share:02d}"] == pytest.approx(exact, rel=0.006, abs=1e-6), (key, share)
        assert sum(figures["histogram"]["counts"]) == pytest.approx(3 * N, abs=0.5)
    kinds = [each["kind"] for each in truth]
    assert found["formats"] == {kind: kinds.count(kind) for kind in sorted(set(kinds), key=lambda k: -kinds.count(k))}
    assert found["words"]["number"] == 3 * N and found["words"]["red"] == 3 * N / 4
    assert found["json"]["level"]["histogram"]["counts"] == [
        sum(each["level"] == level for each in truth) for level in range(4)
    ]


def test_the_result_does_not_depend_on_the_number_of_processes(
    made: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for processes in (1, 2):
        monkeypatch.setattr(megamoe.report.figures, "_salt", itertools.count())  # ids of figures, as in a new process
        assert run(made[0], "--out", tmp_path / str(processes), processes=processes).exit_code == 0
    for name in ("stats.json", "stats.html"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_tokens_are_those_of_the_vocabulary(made: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    texts = [caption(n) for n in range(3 * N)]
    train_tokenizer(texts, tmp_path / "t", 320)
    found = json.loads(run(made[0], "--json", "--tokenizer", tmp_path / "t.model").stdout)
    tokenizer = Tokenizer(tmp_path / "t.model")
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert found["caption_tokens"]["mean"] == pytest.approx(np.mean(lengths))
    assert found["caption_tokens"]["p50"] == np.quantile(lengths, 0.5, method="lower")
    assert isinstance(run(made[0], "--tokenizer", tmp_path / "none").exception, DataError)


class Page(HTMLParser):
    """Tags and text of a page; tags are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_shows_what_was_asked_for(
    made: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    assert run(made[0], "--out", tmp_path, "--sample", 7).exit_code == 0
    page = Page(tmp_path / "stats.html")
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 7 and all((each["src"] or "").startswith("data:image/webp;base64,") for each in pictures)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("href", "xlink:href")]
    assert all((link or "").startswith("#") for link in links)
    for title in ("Width", "Aspect", "Characters per caption", "similarity", "punsafe", "Most frequent words"):
        assert title in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 5 + 3


def test_captions_and_columns_of_strangers_are_only_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=http://x onerror=alert(1)>"
    record = json.dumps({"caption": evil, evil: 1.5, "$x$": 2, "n": float("nan"), "huge": 10**400, "ok": True}).encode()
    members = [(f"{n}.{ext}", body) for n in "ab" for ext, body in (("jpg", picture(9, 9)), ("json", record))]
    write_tar(tmp_path / "in/a.tar", members)
    result = run(tmp_path / "in", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    page = Page(tmp_path / "out/stats.html")
    assert "script" not in {tag for tag, _ in page.tags} and evil in page.text
    assert not any("onerror" in attributes for _, attributes in page.tags)
    found = json.loads((tmp_path / "out/stats.json").read_text())
    assert found["json_not_finite"] == {"huge": 2, "n": 2} and found["json"]["n"] == {"count": 0}


def test_samples_that_cannot_be_used_are_counted_by_what_they_lack(tmp_path: Path) -> None:
    good, text = picture(20, 10), b"a caption"
    members = [
        *[("1.jpg", good), ("1.txt", text), ("2.jpg", good), ("3.txt", text), ("4.jpg", b"<html>"), ("4.txt", text)],
        *[
            ("5.jpg", good),
            ("5.txt", b"\xff"),
            ("6.jpg", good),
            ("6.json", b"[" * 100_000),
            ("1.jpg", good),
            ("1.txt", text),
        ],
    ]
    write_tar(tmp_path / "a.tar", members)
    found = json.loads(run(tmp_path / "a.tar", "--json").stdout)
    assert found["samples"] == 1 and found["left_out"] == {
        "no caption": 2,
        "damaged caption": 1,
        "damaged picture": 1,
        "duplicate key": 1,
        "no picture": 1,
    }


def test_the_size_of_a_picture_may_lie_behind_a_long_profile(tmp_path: Path) -> None:
    image = picture(123, 45, icc_profile=bytes(200_000))
    assert image.index(b"\xff\xc0\x00\x11") > 1 << 16
    write_tar(tmp_path / "a.tar", [("1.jpg", image), ("1.txt", b"a")])
    found = json.loads(run(tmp_path / "a.tar", "--json").stdout)
    assert (found["width"]["max"], found["height"]["max"]) == (123, 45)


def test_a_damaged_shard_is_named_and_counted_up_to_the_damage(tmp_path: Path) -> None:
    for name in ("a", "b"):
        members = [m for n in range(9) for m in ((f"{name}{n}.jpg", picture(30, 30)), (f"{name}{n}.txt", b"some words"))]
        write_tar(tmp_path / f"in/{name}.tar", members)
    os.truncate(tmp_path / "in/a.tar", 9000)
    result = run(tmp_path / "in", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/stats.json").read_text())
    assert result.exit_code == 1 and "a.tar: truncated at byte 9000" in result.stderr
    assert 9 < found["samples"] < 18 and len(found["damaged_shards"]) == 1
    assert "truncated at byte 9000" in Page(tmp_path / "out/stats.html").text


def test_shards_without_a_sample_have_a_page_too(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("README", b"")])
    assert run(tmp_path / "a.tar", "--out", tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out/stats.json").read_text())["samples"] == 0
    Page(tmp_path / "out/stats.html")


def test_memory_is_bounded_for_any_number_of_words_and_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_module, "MAX_WORDS", 50)
    monkeypatch.setattr(stats_module, "MAX_COLUMNS", 5)
    members = []
    for n in range(40):
        word = "".join(chr(97 + int(digit)) for digit in f"{n:04d}")
        record = json.dumps({"caption": f"dog {word}x {word}y", f"c{n}": n}).encode()
        members += [(f"{n}.jpg", picture(9, 9)), (f"{n}.json", record)]
    write_tar(tmp_path / "a.tar", members)
    found = json.loads(run(tmp_path / "a.tar", "--json").stdout)
    assert found["words"]["dog"] == 40 and len(found["words"]) <= 50 and found["words_are_lower_bounds"]
    assert list(found["json"]) == ["c0", "c1", "c2", "c3", "c4"] and found["json_columns_left_out"]


def test_a_dry_run_and_a_run_without_out_write_nothing(made: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    assert f"written: {tmp_path}/x/stats.json" in run(made[0], "--out", tmp_path / "x", "--dry-run").stdout
    assert run(made[0]).stdout.startswith("samples:") and not list(tmp_path.iterdir())


numbers = st.lists(
    st.floats(-1e12, 1e12, allow_subnormal=False) | st.integers(-500, 500).map(float), min_size=1, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(numbers, st.integers(0, 60), st.floats(0, 1))
def test_a_sketch_of_parts_is_that_of_the_whole(values: list[float], cut: int, share: float) -> None:
    whole, left, right = Sketch(), Sketch(), Sketch()
    for i, value in enumerate(values):
        whole.add(value)
        (left if i < cut else right).add(value)
    left.merge(right)
    assert (left.count, left.least, left.most, left.whole) == (whole.count, whole.least, whole.most, whole.whole)
    assert left.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-6 * max(map(abs, values)))
    assert left.quantile(share) == whole.quantile(share)
    exact = sorted(values)[math.floor(share * (len(values) - 1))]
    assert whole.quantile(share) == pytest.approx(exact, rel=0.006, abs=1e-8)
    edges, counts = whole.histogram()
    slack = 1e-12 * max(map(abs, values))
    assert edges[0] <= min(values) + slack and edges[-1] >= max(values) - slack
    assert counts.sum() == pytest.approx(len(values))
