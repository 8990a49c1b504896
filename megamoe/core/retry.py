"""How long to wait before the next try."""

from __future__ import annotations

import random
from dataclasses import dataclass

_MOST_DOUBLINGS = 62  # beyond it a float would overflow long after any sensible limit


@dataclass(frozen=True)
class Backoff:
    """Waits that double with each failure in a row.

    Attributes:
        first: seconds after the first failure.
        longest: upper bound in seconds, also of what the other side asks for.
        jitter: largest share by which a wait is shortened at random, so that many processes do not come back at once.
    """

    first: float
    longest: float
    jitter: float = 0.0

    def wait(self, failures: int, asked: float = 0.0) -> float:
        """Return the seconds to wait after so many failures in a row, at least the ``asked`` ones within the bound."""
        doubled = self.first * 2 ** min(failures - 1, _MOST_DOUBLINGS)
        if self.jitter:
            doubled *= random.uniform(1.0 - self.jitter, 1.0)
        return min(max(doubled, asked), self.longest)
