"""Measure how well the sample order mixes a sorted set, beside WebDataset's buffer and a perfect shuffle.

    python benchmarks/shuffle.py [--shards 256] [--samples 4000] [--batch 256] [--ranks 8] [--figure FILE] [--json FILE]

One epoch of ``--shards`` x ``--samples`` samples goes through ``SampleOrder`` with several values of
``data.shuffle_shards``, through WebDataset's own stages (``shardshuffle=100`` and ``.shuffle(n)``, as in its documentation)
over a source that yields numbers instead of samples, and through a random permutation. Our order is the same on any number
of ranks. With WebDataset each rank reads its own shards, so more ranks mix a global batch better: it is measured on one
rank, and on ``--ranks`` ranks that contribute equal parts of each batch. The set is sorted in the two worst ways: each
shard is a class of its own, or the samples are sorted into ``--classes`` classes smaller than a shard. Columns of the
table:

- *moved*: mean distance between a sample's place in the listing and in the order, as a share of the set (perfect: 1/3);
- *classes per batch*: distinct classes in a batch, as a share of the number that a perfect shuffle is expected to have;
- *worst tenth*: the same, averaged over the tenth of the batches with the fewest classes;
- *shard in use*: the longest stretch of the order between the first and the last sample of one shard, in shards: how long
  a reader needs that shard. The script checks that in our order it never exceeds a window.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import webdataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megamoe.bench.tables import table_head, table_row
from megamoe.data.order.sample_order import SampleOrder

WINDOWS = (1, 2, 4, 8, 16, 32)
BUFFERS = (1000, 10_000)
SHARD_BUFFER = 100  # WebDataset's value for shardshuffle=True
SHOWN = (  # in the upper row of the figure
    "WebDataset, buffer of 1,000", "WebDataset, buffer of 10,000", "MegaMoE, 8 shards", "MegaMoE, 32 shards",
    "perfect shuffle",
)  # fmt: skip
SEED = 3
Order = npt.NDArray[np.int64]  # numbers of the samples in the listing, in the order in which they are read


def main() -> None:
    """Measure every order, print the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4000, help="Samples per shard.")
    parser.add_argument("--classes", type=int, default=1000, help="Classes of the set that is sorted by sample.")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=8, help="Ranks that share a batch.")
    parser.add_argument("--figure", type=Path, default=Path(__file__).resolve().parent.parent / "docs/images/shuffle.png")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.batch % arguments.ranks or arguments.shards % arguments.ranks:
        parser.error(f"--ranks {arguments.ranks}: must divide --batch and --shards, because each rank gets an equal part")
    shards, samples = arguments.shards, arguments.samples
    total = shards * samples
    listing = np.arange(total)
    labels = {"shard": listing // samples, "sample": listing * arguments.classes // total}

    orders: dict[str, Callable[[], Order]] = {}
    for ranks, where in ((1, ""), (arguments.ranks, f", {arguments.ranks} ranks")):
        for size in BUFFERS:
            name = f"WebDataset, buffer of {size:,}{where}"
            orders[name] = partial(webdataset_order, shards, samples, size, ranks, arguments.batch)
    windows = {f"MegaMoE, {window} shard{'s' if window > 1 else ''}": window for window in WINDOWS if window <= shards}
    orders |= {name: partial(our_order, shards, samples, window) for name, window in windows.items()}
    orders["perfect shuffle"] = lambda: np.random.default_rng(SEED).permutation(total)

    print(f"{shards} shards of {samples:,} samples, batches of {arguments.batch}, one epoch.\n")
    mixing = [column for kind in labels for column in (f"classes per batch, sorted by {kind}", "worst tenth")]
    print(table_head(["order", "moved", *mixing, "shard in use (shards)"]))
    figures: dict[str, dict[str, float]] = {}
    shown: dict[str, Order] = {}
    for name, make in orders.items():
        order = make()
        assert np.array_equal(np.sort(order), listing), f"{name}: not every sample comes exactly once"
        shown[name] = order[:: max(1, total // 4000)]
        figures[name] = measured = measure(order, samples, labels, arguments.batch)
        bound = windows.get(name)
        assert bound is None or measured["shard_in_use"] <= bound, f"{name}: a shard is needed for longer than a window"
        shares = [f"{measured[f'{kind}_{what}']:.1%}" for kind in labels for what in ("classes", "worst")]
        print(table_row([name, f"{measured['moved']:.1%}", *shares, f"{measured['shard_in_use']:.1f}"]), flush=True)
    draw(figures, shown, total, arguments.figure)
    if arguments.json:
        setting = {name: getattr(arguments, name) for name in ("shards", "samples", "classes", "batch")}
        arguments.json.write_text(json.dumps({**setting, "orders": figures}, indent=1) + "\n")


def our_order(shards: int, samples: int, window: int) -> Order:
    """Return our order of one source's first epoch."""
    order = SampleOrder([shards], [1.0], lambda *_: samples, seed=SEED, lanes=1, shuffle_shards=window)
    refs = (order.locate(0, k) for k in range(shards * samples))
    return np.fromiter((ref.shard * samples + ref.sample for ref in refs), np.int64, shards * samples)


def webdataset_order(shards: int, samples: int, buffer: int, ranks: int, batch: int) -> Order:
    """Return the order of ``WebDataset(urls, shardshuffle=100).shuffle(buffer)``, with numbers instead of tar files.

    Each rank reads its own part of the shards and contributes its part of each batch.
    """

    def read(shard_list: Iterable[dict[str, str]]) -> Iterator[int]:
        for shard in shard_list:
            first = int(shard["url"]) * samples
            yield from range(first, first + samples)

    streams = []
    for rank in range(ranks):
        pipeline = webdataset.DataPipeline(
            webdataset.SimpleShardList([str(shard) for shard in range(rank, shards, ranks)]),
            webdataset.shuffle(SHARD_BUFFER, seed=SEED),
            read,
            webdataset.shuffle(buffer, seed=SEED + 1 + rank),
        )
        streams.append(np.fromiter(pipeline, np.int64))
    whole = len(streams[0]) - len(streams[0]) % (batch // ranks)
    parts = np.stack([stream[:whole].reshape(-1, batch // ranks) for stream in streams], axis=1)
    return np.concatenate([parts.ravel(), *(stream[whole:] for stream in streams)])


def measure(order: Order, samples: int, labels: dict[str, Order], batch: int) -> dict[str, float]:
    """Return the columns of the table, as shares."""
    total = len(order)
    places = np.empty(total, dtype=np.int64)
    places[order] = np.arange(total)
    by_shard = places.reshape(-1, samples)
    found = {
        "moved": float(np.abs(places - np.arange(total)).mean() / total),
        "shard_in_use": float((by_shard.max(axis=1) - by_shard.min(axis=1) + 1).max() / samples),
    }
    for kind, label in labels.items():
        batches = np.sort(label[order[: total - total % batch]].reshape(-1, batch), axis=1)
        distinct = np.sort(1 + np.count_nonzero(np.diff(batches, axis=1), axis=1)) / expected_classes(label, batch)
        found[f"{kind}_classes"] = float(distinct.mean())
        found[f"{kind}_worst"] = float(distinct[: max(1, len(distinct) // 10)].mean())
    return found


def expected_classes(labels: Order, batch: int) -> float:
    """Return the expected number of distinct classes among ``batch`` samples drawn without replacement."""
    total = len(labels)
    sizes = np.bincount(labels).astype(np.float64)
    absent = np.ones_like(sizes)  # probability that no sample of the class is drawn
    for drawn in range(batch):
        absent *= np.maximum(0, total - sizes - drawn) / (total - drawn)
    return float((1 - absent).sum())


def draw(figures: dict[str, dict[str, float]], shown: dict[str, Order], total: int, file: Path) -> None:
    """Draw where samples go under some of the orders, and the classes per batch under all of them."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in shown if name in SHOWN]
    figure = pyplot.figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, len(names), height_ratios=[1, 1.25])
    for column, name in enumerate(names):
        axes: Any = figure.add_subplot(grid[0, column])
        axes.plot(np.linspace(0, 1, len(shown[name])), shown[name] / total, ",", color="#1f4e79", alpha=0.9)
        axes.set(title=name, xlim=(0, 1), ylim=(0, 1), xticks=[0, 1], yticks=[0, 1], xlabel="place in the order")
        axes.title.set_fontsize(9)
        if column == 0:
            axes.set_ylabel("place in the listing")
    axes = figure.add_subplot(grid[1, :])
    bars = list(figures)
    across = np.arange(len(bars))
    for shift, kind, colour in ((-0.2, "shard", "#1f4e79"), (0.2, "sample", "#e08a1e")):
        values = [100 * figures[name][f"{kind}_classes"] for name in bars]
        drawn = axes.bar(across + shift, values, 0.38, color=colour, label=f"set sorted by {kind}")
        axes.bar_label(drawn, fmt="%.0f", fontsize=8)
    axes.set_xticks(across, [name.replace(", ", ",\n").replace("buffer of ", "buffer\n") for name in bars], fontsize=8)
    axes.set(ylabel="classes per batch (% of perfect)", ylim=(0, 112))
    axes.legend(loc="upper left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
