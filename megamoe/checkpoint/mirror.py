"""Mirror a run's checkpoints to a remote store while training continues, keeping as many as the run keeps."""

from __future__ import annotations

import threading
from pathlib import Path

from megamoe.checkpoint.folders import checkpoints_of, to_delete
from megamoe.checkpoint.remote import RemoteCheckpoints
from megamoe.config.training import CheckpointConfig
from megamoe.core.errors import CheckpointError
from megamoe.core.log import say


class Mirror:
    """A thread of rank 0 that makes the store hold what the run's folder holds.

    A failed copy is reported on stderr and retried with the next checkpoint: the local checkpoint is good, and training
    continues. Each round compares the store with the run's folder, so an interrupted copy is completed after a restart.

    Args:
        store: The remote store.
        run: Folder of the run.
        settings: How many checkpoints to keep.
    """

    def __init__(self, store: RemoteCheckpoints, run: Path, settings: CheckpointConfig):
        self._store, self._run, self._settings = store, run, settings
        self._changed = threading.Condition()
        self._rounds_asked, self._rounds_begun, self._idle, self._ending = 0, 0, True, False
        self._failure: CheckpointError | None = None
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """Announce that a checkpoint was added or deleted."""
        with self._changed:
            self._rounds_asked, self._idle = self._rounds_asked + 1, False
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until no copy is in progress."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle)

    def finish(self) -> None:
        """Wait until everything is copied, and end the thread.

        Raises:
            CheckpointError: the newest checkpoint could not be copied.
        """
        self.changed()
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while self._next():
            try:
                self._round()
                self._failure = None
            except CheckpointError as error:
                self._failure = error
                say(f"{error}; the local checkpoints are whole")

    def _next(self) -> bool:
        """Wait until there is something to do; return False at the end."""
        with self._changed:
            self._idle = self._rounds_asked == self._rounds_begun
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._rounds_asked > self._rounds_begun or self._ending)
            more = self._rounds_asked > self._rounds_begun
            self._rounds_begun, self._idle = self._rounds_asked, not more
            return more

    def _round(self) -> None:
        local = dict(checkpoints_of(self._run))
        for step in sorted(local, reverse=True):
            try:
                self._store.put(local[step])
            except FileNotFoundError:  # deleted meanwhile
                del local[step]
        steps = [step for step in self._store.steps() if step <= max(local, default=0)]
        for step in to_delete(steps, self._settings.keep, self._settings.keep_every):
            self._store.delete(step)
