"""Draw curves and heat maps as inline SVG with the colours of the page, so that they fit light and dark schemes.

matplotlib draws in placeholder colours, which are then replaced by CSS variables of base.html.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

Array = npt.NDArray[np.float64]

INK, GRID, SERIES = "#010203", "#010204", ("#010205", "#010206")
VARIABLES = {INK: "--muted", GRID: "--grid", SERIES[0]: "--series-1", SERIES[1]: "--series-2"}
POINTS = 400  # per curve: more than a screen can show would only make the page larger
LABELLED_EXPERTS = 16  # with more experts in a row the numbers are not legible
VECTOR_CELLS = 2000  # above this a heat map is drawn as pixels

# The mean is transparent, so that it is the colour of the card in both schemes.
BALANCE = LinearSegmentedColormap.from_list(
    "balance",
    [
        (0, (0.16, 0.42, 0.86, 0.85)),
        (0.5, (0.16, 0.42, 0.86, 0)),
        (0.5, (0.88, 0.36, 0.1, 0)),
        (1, (0.88, 0.36, 0.1, 0.85)),
    ],
)

_salt = itertools.count()  # ids must differ between the figures of a page


def curves(steps: Array, series: Mapping[str, Array], log: bool = False, raw: bool = True) -> Markup:
    """Draw at most two curves over the steps; NaN leaves a gap.

    Args:
        steps: (N,) optimizer steps.
        series: label -> (N,) values; a legend is drawn for more than one.
        log: use a logarithmic axis for the values.
        raw: draw the running mean, and faintly behind it the values themselves; otherwise draw only the values.
    """
    assert 1 <= len(series) <= len(SERIES)
    figure, canvas = new_figure(height=2.3)
    with house_style():
        axes = figure.add_subplot()
        marker = "o" if len(steps) < 3 else None
        behind = raw and len(steps) >= 20
        for place, ((label, values), colour) in enumerate(zip(series.items(), SERIES, strict=False)):
            above = 3 - 0.1 * place  # where curves meet, the first one is on top
            if behind:
                axes.plot(*_thin(steps, values), color=colour, alpha=0.25, linewidth=0.8, zorder=2)
            mean = smooth(values) if behind else values
            axes.plot(*_thin(steps, mean), color=colour, linewidth=1.8, label=label, marker=marker, zorder=above)
        if log and any((values > 0).any() for values in series.values()):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step")
        if len(series) > 1:
            axes.legend(frameon=False, loc="best")
        return as_svg(canvas)


def expert_heat_map(load: Mapping[str, Array]) -> Markup:
    """Draw the load of each expert relative to the mean of its layer: a row per layer, a column per expert.

    Args:
        load: layer name -> (E,) fractions of the layer's routed tokens.
    """
    rows = [np.asarray(row) * len(row) for row in load.values()]
    width = max(map(len, rows))
    grid = np.full((len(rows), width), np.nan)
    for index, row in enumerate(rows):
        grid[index, : len(row)] = row
    figure, canvas = new_figure(height=0.9 + 0.3 * len(rows), width=8.0)
    with house_style():
        axes = figure.add_subplot()
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(grid),
            cmap=BALANCE,
            norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=2.0),
            edgecolors=GRID,
            linewidth=0.8 if grid.size <= VECTOR_CELLS else 0,
            rasterized=grid.size > VECTOR_CELLS,
        )
        if width <= LABELLED_EXPERTS:
            for (y, x), value in np.ndenumerate(grid):
                if np.isfinite(value):
                    axes.text(x + 0.5, y + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(rows)) + 0.5, list(load), parse_math=False)
        shown = range(0, width, max(1, width // 16))
        axes.set_xticks([expert + 0.5 for expert in shown], [str(expert) for expert in shown])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel("expert")
        bar = figure.colorbar(mesh, ax=axes, ticks=[0, 1, 2], fraction=0.03, pad=0.02)
        bar.ax.set_yticklabels(["0", "mean", "2x"])
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)
        return as_svg(canvas)


def smooth(values: Array) -> Array:
    """Return the running mean over about a fiftieth of the curve, centred so that it does not lag; NaN is ignored."""
    half = len(values) // 100
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    # The window shrinks on both sides at the start; otherwise the mean would flatten the steep slope there.
    reach = np.minimum(half, index)
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    with np.errstate(invalid="ignore"):
        mean: Array = (total[high] - total[low]) / (count[high] - count[low])
    return mean


def _thin(steps: Array, values: Array) -> tuple[Array, Array]:
    """Reduce a curve to at most POINTS points: the minimum and maximum of each piece, so that spikes remain."""
    if len(steps) <= POINTS:
        return steps, values
    kept = set()
    for piece in np.array_split(np.arange(len(steps)), POINTS // 2):
        finite = piece[np.isfinite(values[piece])]
        chosen = finite if len(finite) else piece
        kept |= {chosen[values[chosen].argmin()], chosen[values[chosen].argmax()]}
    index = sorted(kept)
    return steps[index], values[index]


def new_figure(height: float, width: float = 4.6) -> tuple[Figure, FigureCanvasSVG]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    return figure, FigureCanvasSVG(figure)


@contextmanager
def house_style() -> Iterator[None]:
    with rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": f"megamoe-{next(_salt)}",
            "font.size": 9,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.facecolor": "none",
        }
    ):
        yield


def as_svg(canvas: FigureCanvasSVG) -> Markup:
    buffer = io.StringIO()
    canvas.print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # HTML needs no XML name spaces, and the page decides the width of the figure.
    svg = re.sub(r'\s(xmlns(:xlink)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = re.sub(r'<g id="[A-Za-z][A-Za-z0-9.]*_\d+"', "<g", svg)  # ids such as axes_1 would repeat in every figure
    svg = re.sub(r"font-family:[^;\"]*|(font: [\d.]+px) [^;\"]*", r"\1", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)  # matplotlib has escaped the labels
