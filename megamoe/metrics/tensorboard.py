"""Write the records of steps to TensorBoard: scalars, expert load by layer, pictures with their captions."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megamoe.metrics.step_record import Number, StepRecord

SCALARS = {
    "loss": "loss/total",
    "lm_loss": "loss/language_model",
    "aux_loss": "loss/load_balance",
    "z_loss": "loss/router_z",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/learning_rate",
    "tokens_per_second": "speed/tokens_per_second",
    "model_flops_per_second": "speed/model_flops_per_second",
    "step_seconds": "speed/step_seconds",
    "data_seconds": "speed/data_seconds",
    "world_size": "run/world_size",
    "tokens": "run/tokens",
    "samples": "run/samples",
    "lost": "run/lost_samples",
}
HEAT_MAP_PACE = 10  # a picture weighs as much as a thousand scalars, and the load moves slowly


class TensorBoardSink:
    """Write event files. One process of a run holds the writer.

    Args:
        folder: RUN/tensorboard.
        resume_step: Last step that counts; TensorBoard hides what was written after it. None for a new run.
        every: Steps between records that are written. Every tenth of them brings a heat map of the expert load.
    """

    def __init__(self, folder: Path, resume_step: int | None, every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and only one rank needs it

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)
        self._every = every
        self._since: defaultdict[str, float] = defaultdict(float)  # figures of the data since the last record written

    def write(self, record: StepRecord) -> None:
        """Write a record if its step is due; step 1 always is. Figures of the data are summed over the steps in between."""
        step = record["step"]
        self._add_up(record)
        if step % self._every and step != 1:
            return
        for tag, amount in self._since.items():
            self._writer.add_scalar(tag, amount, step)
        self._since.clear()
        for key, tag in SCALARS.items():
            value = record.get(key)
            if isinstance(value, int | float):
                self._writer.add_scalar(tag, value, step)
        if load := record.get("load"):
            self._write_load(step, load)

    def pictures(self, step: int, pixels: npt.NDArray[np.uint8], captions: Sequence[str]) -> None:
        """Write ``pixels`` (N, H, W, 3) as one image, each picture under its caption, and the captions as text."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        assert len(pixels) == len(captions) > 0
        columns = min(4, len(pixels))
        rows = math.ceil(len(pixels) / columns)
        figure = Figure(figsize=(3 * columns, 3.4 * rows), layout="constrained")
        for place, (picture, caption) in enumerate(zip(pixels, captions, strict=True), start=1):
            axes = figure.add_subplot(rows, columns, place)
            axes.imshow(picture)
            axes.set_axis_off()
            # parse_math: a caption with dollar signs is no formula.
            axes.set_title(_wrapped(caption), fontsize=9, parse_math=False)
        canvas = FigureCanvasAgg(figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            canvas.draw()
        image = np.asarray(canvas.buffer_rgba())[..., :3]
        self._writer.add_image("train/pictures", image, step, dataformats="HWC")
        self._writer.add_text("train/captions", "\n".join(f"    {' '.join(text.split())}" for text in captions), step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _add_up(self, record: StepRecord) -> None:
        groups = {f"data_{name}": given for name, given in record.get("sources", {}).items()}
        groups["data_reading"] = record.get("reading", {})
        for group, figures in groups.items():
            for what, amount in figures.items():
                self._since[f"{group}/{what}"] += amount or 0

    def _write_load(self, step: int, load: Mapping[str, Sequence[Number]]) -> None:
        # 1 is perfect balance; the largest value is how much longer than that the slowest expert works.
        relative = {layer: np.asarray(row, dtype=np.float64) * len(row) for layer, row in load.items()}
        for layer, row in relative.items():
            self._writer.add_scalar(f"expert_load/{layer}/max", row.max(), step)
            self._writer.add_scalar(f"expert_load/{layer}/mean", row.mean(), step)
            self._writer.add_scalar(f"expert_load/{layer}/min", row.min(), step)
        if step == 1 or (step // self._every) % HEAT_MAP_PACE == 0:
            self._writer.add_image("expert_load", heat_map(list(relative.values())), step, dataformats="HWC")


def heat_map(rows: Sequence[npt.NDArray[np.float64]], cell: int = 16) -> npt.NDArray[np.uint8]:
    """Draw the load of experts relative to the mean: a row per layer, a square of ``cell`` pixels per expert.

    Returns:
        (len(rows) * cell, longest row * cell, 3). Dark is no load, the middle of the scale is the mean, bright is
        twice the mean or more. Rows of layers with fewer experts end in grey.
    """
    from matplotlib import colormaps

    grid = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for index, row in enumerate(rows):
        grid[index, : len(row)] = row
    colours = colormaps["viridis"].with_extremes(bad="grey")(np.ma.masked_invalid(grid / 2))
    pixels: npt.NDArray[np.uint8] = np.rint(colours[..., :3] * 255).astype(np.uint8)
    return pixels.repeat(cell, axis=0).repeat(cell, axis=1)


def _wrapped(text: str, width: int = 34, lines: int = 3) -> str:
    import textwrap

    return textwrap.fill(text, width, max_lines=lines, placeholder=" ...")
