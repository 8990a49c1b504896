"""RUN/launch/supervisor.json: where the supervisor of a run listens; and RUN/launch/pulse: whether it is alive."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megamoe.core.errors import UserError
from megamoe.core.run_folder import RunFolder


@dataclass(frozen=True)
class Invitation:
    """How agents find a supervisor.

    Attributes:
        hosts: addresses and names of its host, to be tried one after the other.
        port: its control port.
        token: secret of this supervisor and its agents.
        job: allocation that it runs in.
    """

    hosts: list[str]
    port: int
    token: str
    job: str

    def write(self, run_dir: Path) -> None:
        """Write it into the run's folder, readable by this user alone."""
        path = RunFolder(run_dir).launch.supervisor
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(self), file)
        temporary.replace(path)

    def remove(self, run_dir: Path) -> None:
        """Remove it from the run's folder, unless another supervisor has taken over."""
        if read_invitation(run_dir) == self:
            RunFolder(run_dir).launch.supervisor.unlink(missing_ok=True)


def read_invitation(run_dir: Path) -> Invitation | None:
    """Read the invitation of a run's supervisor; None when there is none.

    Raises:
        UserError: the file is somebody else's, who could have this node start what he likes.
    """
    path = RunFolder(run_dir).launch.supervisor
    try:
        with path.open() as file:
            owner = os.fstat(file.fileno()).st_uid
            if owner != os.getuid():
                raise UserError(f"{path}: belongs to user {owner}, not to you; take away others' right to write there")
            return Invitation(**json.load(file))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


class Pulse:
    """The supervisor's sign of life on the shared file system.

    An agent that has lost its connection looks here whether the supervisor is dead or the network between them is cut.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = RunFolder(run_dir).launch.pulse

    def beat(self) -> None:
        """Say that the supervisor is alive; a full disk does not end the run."""
        with contextlib.suppress(OSError):
            self._path.write_text(f"{time.time()}\n")

    def read(self) -> str:
        """Return what the last beat has written; empty if there was none."""
        try:
            return self._path.read_text()
        except OSError:
            return ""
