"""A child process that ends when its parent is gone, however the parent ended.

Linux can send a signal at the death of a parent (``PR_SET_PDEATHSIG``), but sends it when the thread that started the
child ends, and a child of the child would live on. So each child waits in a thread of its own for the end of something
that the parent holds open: a pipe, or the parent's sentinel in ``multiprocessing``.

The ranks of a launcher are another matter (:mod:`launcher.workers.guard`). A rank may be stopped, or hold the
interpreter lock in a collective, and has children of its own. There a separate process kills whole process groups.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

ORPHANED = 1
"""Exit status of a process that ended since its parent was gone; nobody is left to read it."""


def end_with_parent(wait_for_its_end: Callable[[], object], before: Callable[[], object] | None = None) -> None:
    """Start a thread that ends this process at once when its parent is gone.

    Args:
        wait_for_its_end: returns when the parent is gone.
        before: what to do then, before the end.
    """

    def watch() -> None:
        wait_for_its_end()
        if before is not None:
            before()
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
