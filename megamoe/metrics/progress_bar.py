"""Show a waiting person where the run is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm import tqdm

from megamoe.metrics.step_record import StepRecord

TERMINAL_VARIABLE = "MEGAMOE_TERMINAL"
"""A launcher sets this to 1 if it passes the output of rank 0 on to a terminal; the rank itself sees only a pipe."""


class Progress:
    """Show step, loss, tokens per second and the time left on stderr. One process of a run holds the progress line.

    Args:
        steps: Optimizer steps of the whole run.
        done: Steps that were done before this process, after a resume.
        interval: Seconds between plain lines where there is no terminal.
    """

    def __init__(self, steps: int, done: int = 0, interval: float = 10.0) -> None:
        self._steps, self._done, self._interval = steps, done, interval
        self._step = done
        self._start = time.monotonic()
        self._shown = float("-inf")
        self._bar: Any = None
        if sys.stderr.isatty() or os.environ.get(TERMINAL_VARIABLE) == "1":
            self._bar = tqdm(
                total=steps,
                initial=done,
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=0.2,
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}",
            )

    def update(self, record: StepRecord) -> None:
        """Show the step just done."""
        step, loss, speed = record["step"], record["loss"], record["tokens_per_second"]
        assert loss is not None and speed is not None, "only records that were read back have None"
        figures = f"loss {loss:.4f}, {_short(speed)} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(step - self._step)
        self._step = step
        now = time.monotonic()
        if self._bar is None and (now - self._shown >= self._interval or step >= self._steps):
            self._shown = now
            left = (now - self._start) / max(step - self._done, 1) * max(self._steps - step, 0)
            print(f"step {step}/{self._steps}, {figures}, {_clock(left)} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last state of the bar on the terminal and end its line."""
        if self._bar is not None:
            self._bar.close()


def _short(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"
