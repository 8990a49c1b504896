"""Files in RUN/launch that say what a job is to run: written at submission, read by the supervisor inside the job."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megamoe.core.errors import UserError
from megamoe.core.files import atomic_file
from megamoe.core.run_folder import RunFolder


@dataclass(frozen=True)
class Request:
    """A training as the user asked for it.

    Attributes:
        config: absolute path of the config file.
        overrides: ``KEY=VALUE`` settings, those of options included.
        resume: ``auto``, ``none`` or a checkpoint, for the first start.
        workdir: folder from which it was asked; relative paths of the config count from there.
    """

    config: Path
    overrides: tuple[str, ...]
    resume: str
    workdir: Path

    def write(self, run_dir: Path) -> None:
        """Write RUN/launch/request.json; the next start is the first one."""
        write_json(RunFolder(run_dir).launch.request, dataclasses.asdict(self))
        RunFolder(run_dir).launch.started.unlink(missing_ok=True)

    @classmethod
    def read(cls, run_dir: Path) -> Request:
        """Read the request of a run.

        Raises:
            UserError: nothing was launched there.
        """
        path = RunFolder(run_dir).launch.request
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            paths = {name: Path(content[name]) for name in ("config", "workdir")}
            return cls(**paths, overrides=tuple(content["overrides"]), resume=content["resume"])
        except FileNotFoundError:
            raise UserError(
                f"{run_dir}: no launched run (there is no launch/request.json); give the folder of one"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); launch the run again") from error


def first_start(run_dir: Path) -> bool:
    """Return True once: at the first start since the run was asked for.

    Tells a job that was requeued, or follows another one in a chain, from the first. A job that SLURM took back before
    it had come here is still the first, which SLURM's count of restarts does not say.
    """
    try:
        RunFolder(run_dir).launch.started.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


# One file per job, not one for all: the host that submits and the one that runs the job write at the same time, and on
# NFS each might lose what the other has added.
def note_job(run_dir: Path, job: str, kind: str) -> None:
    """Note in RUN/launch/jobs that ``job`` belongs to the run, as ``run``, ``next`` (of a chain) or ``helper``."""
    folder = RunFolder(run_dir).launch.jobs
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{job}.{kind}").touch()


def forget_job(run_dir: Path, job: str) -> None:
    """Remove ``job`` from the list, since it is over."""
    for path in RunFolder(run_dir).launch.jobs.glob(f"{job}.*"):
        path.unlink(missing_ok=True)


def noted_jobs(run_dir: Path, kinds: Iterable[str] = ("run", "next", "helper")) -> dict[str, str]:
    """Return the ids of the run's jobs, oldest first, each with its kind; some may be over."""
    found = [path.name.split(".") for path in RunFolder(run_dir).launch.jobs.glob("*.*")]
    return {job: kind for job, kind in sorted(found, key=lambda item: int(item[0])) if kind in kinds}


def excluded_nodes(run_dir: Path) -> dict[str, str]:
    """Return the nodes that this run no longer uses, each with the reason."""
    with contextlib.suppress(FileNotFoundError):
        content: dict[str, str] = json.loads(RunFolder(run_dir).launch.excluded.read_text(encoding="utf-8"))
        return content
    return {}


def exclude_node(run_dir: Path, node: str, why: str) -> None:
    """Add a node to RUN/launch/excluded.json."""
    write_json(RunFolder(run_dir).launch.excluded, excluded_nodes(run_dir) | {node: why})


def write_json(path: Path, content: object) -> None:
    """Replace a JSON file as a whole."""
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=1, default=str).encode() + b"\n")
