"""One trial: a training, its faults at their moments, and what is to be said of its end."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil

from benchmarks.chaos.disk import SmallDisk, unmount
from benchmarks.chaos.leftovers import leftovers
from benchmarks.chaos.plan import Fault, Plan
from benchmarks.chaos.training import Missed, Training, can_hide
from benchmarks.chaos.truth import Truth, differences, truth_of
from megamoe.checkpoint.verify import verify_checkpoint
from megamoe.core.exit_status import STOPPED

WATCHDOG = 6.0  # seconds, in trials with something to be noticed by it
_ROOM = 6  # checkpoints that a small disk has room for


@dataclass
class Result:
    """What came of a trial.

    Attributes:
        seed: Its seed.
        plan: In words.
        kinds: Of its faults, in order.
        layouts: What it was launched under, in order.
        lost: Of each fault: see :func:`waits`.
        seconds: From the launch to the end.
        undisturbed: Of the run without faults, under the layout that it began with.
        in_saves: Faults that came while a checkpoint was half written.
        attempts: Times that the ranks were started.
        notes: What else is worth knowing.
        problems: What was not as it has to be; none: the trial is good.
    """

    seed: int
    plan: str
    kinds: list[str]
    layouts: list[str] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    seconds: float = 0.0
    undisturbed: float = 0.0
    in_saves: int = 0
    attempts: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run_trial(folder: Path, plan: Plan) -> Result:
    """Run the trial in ``folder``, which is prepared. A run that was not good stays in ``folder``/runs/seed-S."""
    run = folder / "runs" / f"seed-{plan.seed}"
    for place in (run / "checkpoints", run):
        unmount(place)
    shutil.rmtree(run, ignore_errors=True)
    result = Result(plan.seed, plan.words(), plan.kinds)
    truth = truth_of(folder, plan.layout, plan.lasting is not None)
    result.undisturbed = truth.seconds
    # Paths of sockets are short, those of a test's folder are not.
    with _temporary(None) as temporary, _temporary("/dev/shm") as shared:
        hidden = can_hide()
        if not hidden:
            result.notes.append("no mount namespaces here: what is left in /dev/shm is not looked at")
        trial = _Trial(plan, folder, run, truth, temporary, shared if hidden else None, result)
        try:
            trial.run()
            result.problems += differences(plan, run, truth.run)
            result.problems += trial.damaged()
            result.problems += leftovers(trial.training)
        except (Missed, psutil.Error) as missed:
            result.problems.append(str(missed))
        except BaseException:  # interrupted: nobody looks at the files
            trial.close()
            trial.take_disk_away()
            raise
        trial.close()
        result.attempts = len(list(run.glob("logs/attempt-*")))
    if not result.problems:
        trial.take_disk_away()
        shutil.rmtree(run)
    elif trial.disk is not None and trial.disk.mounted:
        kept = run.with_name(f"{run.name}-kept")
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(run, kept, symlinks=True)
        trial.take_disk_away()
        result.notes.append(f"its files are in {kept}")
    return result


def waits(history: Sequence[tuple[float, int]], struck: Sequence[float], ended: float) -> list[float]:
    """Of each fault the seconds that it cost: the longest time without a new step between it and the next one, or the end.

    Not simply the time until the first new step: a run may do some more steps before a fault takes effect.

    Args:
        history: (time, last step recorded then), where it changed; a step is new if it is later than all before.
        struck: Time of each fault.
        ended: Time of the end of the run.
    """
    new, furthest = [], 0
    for at, step in history:
        if step > furthest:
            new.append(at)
            furthest = step
    lost = []
    for at, until in zip(struck, [*struck[1:], ended], strict=True):
        points = [at, *(time for time in new if at < time < until), until]
        # A NaN may come before the delay of the fault before it is over.
        lost.append(max(0.0, *(later - earlier for earlier, later in pairwise(points))))
    return lost


@contextmanager
def _temporary(where: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=where, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class _Trial:
    """The faults of a plan, made to happen."""

    def __init__(
        self, plan: Plan, folder: Path, run: Path, truth: Truth, temporary: Path, shared: Path | None, result: Result
    ) -> None:
        self.plan, self.run_dir, self.truth, self.result = plan, run, truth, result
        self.disk: SmallDisk | None = None
        full = next((fault for fault in plan.faults if fault.kind == "disk-full"), None)
        if full is not None:
            place = run if full.where == "the run" else run / "checkpoints"
            self.disk = SmallDisk(place, (_ROOM * truth.checkpoint) + (4 << 20))
            if not self.disk.mounted:
                result.notes.append("nothing may be mounted here: a limit on the size of files stands for the full disk")
        variables = {"CHAOS_TRIAL": f"{plan.seed}-{time.time_ns()}", "TMPDIR": str(temporary)}
        self._mark = temporary / "nan"
        nan = next((fault for fault in plan.faults if fault.kind.startswith("nan-")), None)
        if nan is not None:
            variables["CHAOS_NAN"] = f"{nan.step},{nan.rank},{nan.kind[4:]},{self._mark}"
        watched = any(kind.startswith("freeze-") for kind in plan.kinds)
        settings = (f"data.workers={plan.workers}", *([f"train.watchdog_seconds={WATCHDOG:g}"] if watched else []))
        self.training = Training(folder, run, settings, variables, shared)
        self._damaged: list[tuple[str, str]] = []  # folder and file

    def run(self) -> None:
        """Launch, let the faults happen, and wait for the end.

        Raises:
            Missed: a moment did not come, or the end was another one than it has to be.
        """
        started = time.monotonic()
        self._launch(self.plan.layout)
        struck = []
        for fault in self.plan.faults:
            self._wait_for(fault)
            if fault.kind.startswith("nan-"):
                struck.append(self._mark.stat().st_mtime)
                continue
            self.result.in_saves += self.training.saving()
            struck.append(time.time())
            self._strike(fault)
        if (status := self.training.end()) != 0:
            raise Missed(f"the last launch ended with status {status}")
        self.result.seconds = time.monotonic() - started
        ended = time.time()
        time.sleep(0.05)  # the watcher has looked once more
        self.result.lost = waits(self.training.history, struck, ended)

    def damaged(self) -> list[str]:
        """What is wrong with the checkpoints in the end, and with what was said of those that were damaged."""
        folders = self.training.checkpoints()
        wrong = [problem for folder in folders for problem in verify_checkpoint(folder).problems]
        said = self.training.said.read_text(errors="replace")
        refused = [line for line in said.splitlines() if "taking the one before" in line]
        for folder, file in self._damaged:
            if not any(folder in line and file in line for line in refused):
                wrong.append(f"{folder}/{file} was damaged, and nothing said so")
        if len(folders) != 3:
            wrong.append(f"the checkpoints are {[path.name for path in folders]}")
        return wrong

    def close(self) -> None:
        """End what still runs."""
        if self.disk is not None:
            self.disk.free()
        self.training.close()

    def take_disk_away(self) -> None:
        """Only when the files on it are not needed any more."""
        if self.disk is not None:
            self.disk.close()

    def _wait_for(self, fault: Fault) -> None:
        training = self.training
        if fault.kind.startswith("nan-"):
            training.until(self._mark.exists, f"the NaN in step {fault.step}")
            return
        training.until(lambda: bool(training.ranks()), "the ranks were started")
        if fault.when != "start":
            training.until(lambda: training.last_step() >= fault.step, f"step {fault.step}")
        if fault.when == "save":
            training.until(training.saving, f"a save from step {fault.step} on")
        if fault.kind in ("cut-file", "flip-bit"):
            training.until(lambda: len(training.checkpoints()) > 1, "there were two checkpoints")
        time.sleep(fault.delay)

    def _strike(self, fault: Fault) -> None:
        kind = fault.kind.removesuffix("-in-save")
        if kind == "kill-rank":
            self._signal(signal.SIGKILL, self._rank(fault))
        elif kind == "kill-all":
            self._signal(signal.SIGKILL, *self.training.ranks())
        elif kind == "kill-launcher":
            self._kill_launcher()
            self._launch(fault.then)
        elif kind == "kill-worker":
            self._signal(signal.SIGKILL, self._worker(fault))
        elif kind == "freeze-rank":
            self._signal(signal.SIGSTOP, self._rank(fault))
        elif kind == "freeze-worker":
            self._signal(signal.SIGSTOP, self._worker(fault))
        elif kind == "stop":
            self._stop(fault)
        elif kind == "disk-full":
            self._fill_disk(fault)
        elif kind in ("cut-file", "flip-bit"):
            self._damage(fault)

    def _signal(self, number: signal.Signals, *processes: int) -> None:
        self.training.attempt_is_over()
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _kill_launcher(self) -> None:
        process = self.training.process
        assert process is not None
        process.kill()
        process.wait()
        if left := self.training.all_gone():
            raise Missed(f"left behind by the launcher's death: {'; '.join(left)}")

    def _launch(self, layout: str) -> None:
        self.result.layouts.append(layout)
        self.training.launch(layout)

    def _worker(self, fault: Fault) -> int:
        """The data worker of a rank: the child of its fork server, which may only be starting."""
        rank = self._rank(fault)

        def workers() -> list[int]:
            return [each.pid for each in psutil.Process(rank).children(recursive=True) if each.ppid() != rank]

        self.training.until(lambda: bool(workers()), f"rank {fault.rank} had a data worker")
        return workers()[0]

    def _rank(self, fault: Fault) -> int:
        ranks = self.training.ranks()
        if fault.rank >= len(ranks):
            raise Missed(f"there is no rank {fault.rank}: {len(ranks)} ranks are at work")
        return ranks[fault.rank]

    def _stop(self, fault: Fault) -> None:
        process = self.training.process
        assert process is not None
        target = process.pid if fault.whom == "the launcher" else self._rank(fault)
        with suppress(ProcessLookupError):
            os.kill(target, signal.SIGTERM)
        status = self.training.end()
        if status not in (0, STOPPED):
            raise Missed(f"asked to stop, the launcher ended with status {status}")
        self._launch(fault.then)

    def _fill_disk(self, fault: Fault) -> None:
        """Until the launcher has ended or has started the ranks anew."""
        assert self.disk is not None
        self.disk.fill(int(fault.amount * self.truth.checkpoint), self.training.ranks())
        self.training.attempt_is_over()
        try:
            self.training.until(lambda: bool(self.training.ranks()), "the full disk ended the ranks")
            self.disk.free()
        except Missed:
            process = self.training.process
            assert process is not None
            if process.poll() is None:
                raise
            if process.returncode == 0:
                raise Missed("the disk was full, and the run ended with status 0") from None
            self.disk.free()
            self._launch(fault.then)

    def _damage(self, fault: Fault) -> None:
        """Kill, and change a file of the newest checkpoint before anything goes on from it."""
        if fault.whom == "the launcher":
            self._kill_launcher()
        else:
            self._signal(signal.SIGKILL, self._rank(fault))
            self.training.until(lambda: bool(self.training.ranks()), "the ranks were started again")
        newest = self.training.checkpoints()[-1]
        files = sorted(newest.iterdir())
        path = files[fault.pick % len(files)]
        at = int(fault.amount * path.stat().st_size)
        if fault.kind == "cut-file":
            os.truncate(path, at)
        else:
            with path.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << fault.pick % 8]))
        self._damaged.append((newest.name, path.name))
        if fault.whom == "the launcher":
            self._launch(fault.then)
