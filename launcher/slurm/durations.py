"""Time limits as SLURM writes them."""

from __future__ import annotations

import math
import re

from megamoe.core.errors import UserError

_ENDLESS = ("UNLIMITED", "INFINITE", "INVALID", "NOT_SET", "N/A", "NONE")  # the last four: of jobs without a limit


def seconds(text: str) -> float:
    """Convert ``MINUTES``, ``M:S``, ``H:M:S``, ``DAYS-HOURS``, ``D-H:M`` or ``D-H:M:S`` to seconds; infinity: no limit.

    Raises:
        UserError: it is none of them.
    """
    if text.upper() in _ENDLESS:
        return math.inf
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        raise UserError(f"launch.slurm.time {text}: no time of SLURM; write it as 24:00:00, 2-12:00:00 or in minutes")
    days, dash, rest = text.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if dash:
        hours, minutes, last = [*numbers, 0, 0][:3]
    elif len(numbers) == 1:
        hours, minutes, last = 0, numbers[0], 0
    else:
        hours, minutes, last = [0, *numbers][-3:]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + last
