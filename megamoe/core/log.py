"""The lines by which MegaMoE's processes speak to people: ``megamoe: ...`` on stderr."""

from __future__ import annotations

import sys
from typing import TextIO

PREFIX = "megamoe: "


def say(text: str, file: TextIO | None = None) -> None:
    """Write one line at once, to stderr unless another file is given."""
    print(f"{PREFIX}{text}", file=sys.stderr if file is None else file, flush=True)
