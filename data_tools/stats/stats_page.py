"""Show the statistics of shards as one self-contained HTML page, in the style of the page of a run."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image, ImageOps

from data_tools.checks.contents import MAX_MEMBER
from data_tools.stats.shard_stats import Shown, Stats, picture_size, ranked
from data_tools.stats.sketch import Sketch
from megamoe.core.errors import DataError
from megamoe.core.files import atomic_file
from megamoe.data.sample.decode import MAX_PIXELS, CorruptSample
from megamoe.data.shards.index import Extent
from megamoe.data.shards.storage import Storage
from megamoe.report.figures import GRID, SERIES, as_svg, house_style, new_figure
from megamoe.report.html_page import Chart, render_page

WORDS = 30
_SIDE = 320  # pixels: twice the size shown, so that pictures are sharp on high-density screens
_NUMBERS = {
    "width": ("Width", "In pixels, from the header of the picture."),
    "height": ("Height", "In pixels, from the header of the picture."),
    "aspect": ("Aspect", "Width over height; pictures are resized to a square."),
    "image_bytes": ("Bytes per picture", "Size of the file in the shard."),
    "caption_characters": ("Characters per caption", "Surrounding white space is not counted."),
    "caption_tokens": ("Tokens per caption", "With the given vocabulary, without end of sequence."),
}
_COLUMNS = {
    "similarity": "CLIP similarity of picture and caption.",
    "punsafe": "Probability that the picture is unsafe.",
    "pwatermark": "Probability of a watermark.",
    "aesthetic": "Predicted aesthetic score.",
    "original_width": "In pixels, before the picture was resized.",
    "original_height": "In pixels, before the picture was resized.",
}
# English function words, which would fill the whole chart
_COMMON = """
a an and are as at be been but by for from has have he her his i in is it its my not of on or our she so that the their
them they this to up was we were what when which who will with you your s t
"""


class Picture(NamedTuple):
    """A sample on the page: its WebP in base64 and the size of the original picture."""

    id: str
    caption: str
    image: str
    size: str


def write_stats(stats: Stats, out: Path, name: str, sample: int) -> list[Path]:
    """Write ``stats.json`` and ``stats.html`` to ``out``; ``name`` is the title of the page.

    Raises:
        DataError: ``out`` cannot be written.
    """
    with atomic_file(out / "stats.json") as file:
        file.write(json.dumps(stats.as_json(), indent=1, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
    with atomic_file(out / "stats.html") as file:
        file.write(render(stats, name, sample).encode("utf-8", "replace"))
    return [out / "stats.json", out / "stats.html"]


def render(stats: Stats, name: str, sample: int) -> str:
    """Render the page."""
    common = set(_COMMON.split())
    words = [(word, count) for word, count in ranked(stats.words) if word not in common][:WORDS]
    return render_page(
        "data_tools.stats",
        "stats.html",
        name=name,
        tiles=_tiles(stats),
        facts=_facts(stats),
        damaged=stats.damaged,
        numbers=[_chart(*_NUMBERS[key], stats.numbers[key]) for key in _NUMBERS if _has(stats.numbers, key)],
        columns=[_chart(key, _column_hint(stats, key), stats.columns[key]) for key in _ordered(stats.columns)],
        more_columns=stats.more_columns,
        words=[(word, f"{count:,}", 100 * count / words[0][1]) for word, count in words],
        lower_bounds=stats.words_are_lower_bounds,
        pictures=_pictures(stats.shown, sample),
    )


def _ordered(columns: dict[str, Sketch]) -> list[str]:
    """Order the columns: those that rate a sample first, then the others by name."""
    known = [key for key in _COLUMNS if _has(columns, key)]
    return known + sorted(key for key in columns if key not in known and _has(columns, key))


def _has(sketches: dict[str, Sketch], key: str) -> bool:
    return key in sketches and sketches[key].count > 0


def _tiles(stats: Stats) -> list[tuple[str, str]]:
    tiles = [("samples", f"{stats.samples:,}"), ("shards", f"{stats.shards:,}"), ("bytes", _bytes(stats.bytes))]
    if _has(stats.numbers, "width"):
        width, height = (stats.numbers[key].quantile(0.5) for key in ("width", "height"))
        tiles.append(("median pixels", f"{width:.0f} x {height:.0f}"))
        tiles.append(("median picture", _bytes(stats.numbers["image_bytes"].quantile(0.5))))
    unit = "caption_tokens" if _has(stats.numbers, "caption_tokens") else "caption_characters"
    if _has(stats.numbers, unit):
        tiles.append((f"median caption, {unit.partition('_')[2]}", f"{stats.numbers[unit].quantile(0.5):,.0f}"))
    return tiles


def _facts(stats: Stats) -> list[tuple[str, str]]:
    formats = [f"{kind} {count / stats.samples:.1%}" for kind, count in ranked(stats.formats)]
    extensions = [f"{ext} {count:,}" for ext, count in ranked(stats.extensions, 8)]
    lost = [f"{count:,} {cause}" for cause, count in ranked(stats.lost)]
    facts = [("formats", formats), ("members", extensions), ("samples lost", lost or ["none"])]
    return [(label, ", ".join(values)) for label, values in facts if values]


def _column_hint(stats: Stats, key: str) -> str:
    have = stats.columns[key].count
    share = "" if have == stats.samples else f" In {have / stats.samples:.1%} of the samples."
    odd = f" {stats.not_finite[key]:,} are not finite." if stats.not_finite[key] else ""
    return f"{_COLUMNS.get(key, 'From the json.')}{share}{odd}"


def _chart(title: str, hint: str, sketch: Sketch) -> Chart:
    inner = ((f"{share:.0%}", sketch.quantile(share)) for share in (0.05, 0.5, 0.95))
    shown = [("min", sketch.least), *inner, ("max", sketch.most), ("mean", sketch.mean)]
    skewed = sketch.is_skewed()
    hint = f"{hint} Logarithmic." if skewed else hint
    quantiles = [(label, _number(value)) for label, value in shown]
    return Chart(title, hint, _histogram(sketch, skewed), quantiles=quantiles)


def _histogram(sketch: Sketch, skewed: bool) -> Markup:
    edges, counts = sketch.histogram()
    few = len(counts) <= 16 and sketch.whole
    if edges[0] == edges[-1]:  # all values equal: a bar in the middle of the axis
        edges, few = edges + np.array([-0.5, 0.5]), True
    figure, canvas = new_figure(height=1.9)
    with house_style():
        axes = figure.add_subplot()
        if few:
            axes.bar((edges[:-1] + edges[1:]) / 2, counts, width=0.7, color=SERIES[0], alpha=0.85)
            axes.margins(x=0.25 if len(counts) < 4 else 0.02)
        else:
            axes.stairs(counts, edges, fill=True, color=SERIES[0], alpha=0.85)
            axes.margins(x=0)
        axes.axvline(sketch.quantile(0.5), color=SERIES[1], linewidth=1.4)
        if skewed and not few:
            axes.set_xscale("log")
            decades = np.log10(edges[-1] / edges[0])
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=8))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=sketch.whole))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.tick_params(length=0)
        return as_svg(canvas)


def _pictures(shown: Sequence[Shown], sample: int) -> list[Picture]:
    pictures: list[Picture] = []
    storage = Storage()
    for _, name, caption, shard, member in shown:
        if len(pictures) == sample:
            break
        try:
            if member.size <= MAX_MEMBER:
                pictures.append(_picture(name, caption, bytes(storage.read(str(shard), [Extent(*member[1:])])[0])))
        except (CorruptSample, DataError):  # spare pictures take its place; `validate` names the damaged ones
            continue
    storage.close()
    return pictures


def _picture(name: str, caption: str, data: bytes) -> Picture:
    kind, width, height = picture_size(data)
    if width * height > MAX_PIXELS:
        raise CorruptSample("image: too large")
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            image.draft("RGB", (_SIDE, _SIDE))
            small = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception as error:  # decoders raise errors of every type for bad bytes
        raise CorruptSample("image: damaged") from error
    small.thumbnail((_SIDE, _SIDE))
    canvas = Image.new("RGBA", small.size, "white")
    out = io.BytesIO()
    Image.alpha_composite(canvas, small).convert("RGB").save(out, "WEBP", quality=80)
    return Picture(name, caption, base64.b64encode(out.getvalue()).decode(), f"{width} x {height}")


def _number(value: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / limit * (10 if unit == 'k' else 1):.3g}{unit}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def _bytes(count: float) -> str:
    for limit, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f} B"


def summary(stats: Stats) -> dict[str, Any]:
    """Return the tiles and facts of the page, for the terminal."""
    return dict(_tiles(stats) + _facts(stats))
