"""Times as sbatch(1) lists them."""

from __future__ import annotations

import math

import pytest

from launcher.slurm.durations import seconds
from megamoe.core.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90 * 60),
        ("5:30", 330),
        ("24:00:00", 86400),
        ("1-12", 36 * 3600),
        ("1-12:30", 36.5 * 3600),
        ("2-00:00:01", 2 * 86400 + 1),
        ("UNLIMITED", math.inf),
        ("infinite", math.inf),
        ("INVALID", math.inf),
    ],
)
def test_times(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["tomorrow", "1:2:3:4", "-5", "24h", ""])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^launch\.slurm\.time .*24:00:00"):
        seconds(text)
