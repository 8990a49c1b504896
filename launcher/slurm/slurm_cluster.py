"""Get nodes from SLURM: agents by srun, further nodes by helper jobs, another start by requeue or a chain of jobs."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from launcher.slurm import durations
from launcher.slurm.batch_script import agents_command, helper_options, helper_script, node_range
from launcher.slurm.request import exclude_node, excluded_nodes, forget_job, note_job, noted_jobs
from launcher.slurm.tools import expand, outside_job, slurm
from megamoe.config.launch import LaunchConfig
from megamoe.core.errors import UserError
from megamoe.core.retry import Backoff
from megamoe.core.run_folder import RunFolder

LOOK_EVERY = 15.0  # seconds between looks at the queue while nodes are lacking; sites ask not to look more often
AGENT_SECONDS = 60.0  # an agent that has not come so long after its start counts as absent
AGENTS_END = 5.0  # seconds
ASK_AGAIN = Backoff(first=LOOK_EVERY, longest=600.0)  # after a refusal of SLURM
_WAITING = ("PENDING", "CONFIGURING")


class SlurmCluster:
    """The allocation of the SLURM job whose batch script this process is. Implements ``Cluster``.

    Args:
        launch: section ``launch`` of the run's config.
        name: the run's name.
        run_dir: its folder, absolute.
        job: id of the job.
        say: takes a line for the log.
    """

    def __init__(self, launch: LaunchConfig, name: str, run_dir: Path, job: str, say: Callable[[str], None]) -> None:
        self.job = job
        self._launch, self._name, self._run_dir, self._say = launch, name, run_dir, say
        self._agents: list[subprocess.Popen[bytes]] = []
        self._started: dict[str, float] = {}  # when an agent was last started on a node of this allocation
        self._next: str | None = None  # the job that waits for the end of this one
        self._goes_on = False
        self._lock = threading.Lock()
        self._wish = 0
        self._present: frozenset[str] = frozenset()  # nodes whose agents the supervisor has
        self._waiting: tuple[str, list[str]] | None = None  # the helper job that was last changed, and how
        self._refusals = 0
        self._not_before = 0.0  # when to ask again after a refusal
        self._closed = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)

    def start_agents(self) -> int:
        """Start an agent on each node that SLURM counts to this job, and queue the next job of a chain.

        Raises:
            UserError: SLURM does not answer.
        """
        self._end_leftovers()
        if self._launch.slurm.again == "chain":
            self._queue_next()
        nodes = [node for node in self._nodes() if node not in excluded_nodes(self._run_dir)]
        if nodes:
            self._start_on(nodes)
        self._looking.start()
        return len(nodes)

    def nodes_present(self, nodes: Collection[str]) -> None:
        """Take note of the nodes whose agents the supervisor has: they are not asked for again."""
        with self._lock:
            self._present = frozenset(nodes)

    def ask_for_nodes(self, count: int) -> None:
        """Bring ``count`` further agents: on nodes of this job whose agent has ended, the rest by a helper job.

        One helper job waits at a time, for 1 to ``count`` nodes: SLURM starts it with as many as are free, and those
        that still lack are asked for again.
        """
        with self._lock:
            if count != self._wish:
                self._wish, self._refusals, self._not_before = count, 0, 0.0
            self._fulfil()

    def run_again(self, why: str) -> bool:
        """Requeue this job, or let the next one of the chain run."""
        again = self._launch.slurm.again
        if again == "chain" and self._next is not None:
            self._goes_on = True
        elif again == "requeue":
            requeue(self.job, self._run_dir, self._launch)
            self._goes_on = True
        return self._goes_on

    def exclude(self, node: str, why: str) -> None:
        """Never use ``node`` again in this run, whatever job it comes with."""
        exclude_node(self._run_dir, node, why)
        if self._next is not None:
            slurm(
                [
                    "scontrol",
                    "update",
                    f"JobId={self._next}",
                    f"ExcNodeList={','.join(_excluded(self._launch, self._run_dir))}",
                ]
            )

    def close(self) -> None:
        """End this job's agents, all helper jobs, and the next job unless the run continues in it."""
        self._closed.set()
        with self._lock:
            self._wish = 0
            try:
                self._cancel(list(noted_jobs(self._run_dir, ["helper"] if self._goes_on else ["helper", "next"])))
            except UserError as error:  # how the run ended does not depend on it
                self._say(f"jobs of this run may be left in the queue: {error}")
        # They know that the run is over. But where a node is lost, srun still waits for it.
        if not self._ended(AGENTS_END):
            for agents in self._agents:
                agents.terminate()
            if not self._ended(AGENTS_END):
                for agents in self._agents:
                    agents.kill()

    def _ended(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while any(agents.poll() is None for agents in self._agents):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _look(self) -> None:
        """Keep asking while nodes are lacking: helper jobs end, are cancelled, or come with fewer nodes than asked for."""
        while not self._closed.wait(LOOK_EVERY):
            with self._lock:
                if self._wish and not self._closed.is_set():
                    try:
                        self._fulfil()
                    except UserError as error:
                        self._refused(error)

    def _fulfil(self) -> None:
        helpers = self._helpers()
        waiting = [job for job, (state, _) in helpers.items() if state in _WAITING]
        if not self._wish:
            self._cancel(waiting)
            return
        present = self._present
        came = [node for job, (_, nodes) in helpers.items() if job not in waiting for node in nodes]
        lacking = self._wish - len([node for node in came if node not in present])
        lacking -= self._start_absent(present, lacking)
        if lacking <= 0:
            self._cancel(waiting)
        elif waiting:
            self._change_helper(waiting[0], lacking, present | set(came))
        elif time.monotonic() >= self._not_before:
            try:
                self._submit_helper(lacking, present | set(came))
            except UserError as error:
                self._refused(error)

    def _refused(self, error: UserError) -> None:
        # A limit on a user's jobs, for example, may pass, but is no reason to ask every few seconds.
        self._refusals += 1
        self._not_before = time.monotonic() + ASK_AGAIN.wait(self._refusals)
        if self._refusals == 1:
            self._say(f"no further nodes for now: {error}")

    def _change_helper(self, job: str, count: int, present: Collection[str]) -> None:
        """Change a helper job that waits; replaced, it would lose its place in the queue.

        The nodes that it must not use change as well: until SLURM notices that a node is lost, it counts the node as ours,
        and the node may return.
        """
        given = self._launch.slurm.exclude
        not_on = ",".join([*([given] if given else []), *self._not_on(present)])
        wanted = [f"NumNodes=1-{count}" if count > 1 else "NumNodes=1", f"ExcNodeList={not_on}"]
        if (job, wanted) != self._waiting:
            slurm(["scontrol", "update", f"JobId={job}", *wanted])
            self._waiting = job, wanted

    def _not_on(self, present: Collection[str]) -> list[str]:
        return [*dict.fromkeys([*self._nodes(), *sorted(present), *excluded_nodes(self._run_dir)])]

    def _submit_helper(self, count: int, present: Collection[str]) -> None:
        left = durations.seconds(slurm(["squeue", "--noheader", f"--jobs={self.job}", "--format=%L"]).strip() or "INVALID")
        options = helper_options(self._launch, self._name, self._run_dir, Path.cwd(), count, self._not_on(present), left)
        script = helper_script(options, self._launch.slurm, self._name, self._run_dir)
        RunFolder(self._run_dir).launch.helper_script.write_text(script, encoding="utf-8")
        job = slurm(["sbatch", "--parsable"], script, outside_job([each for _, group in options for each in group]))
        job = job.strip().split(";")[0]
        note_job(self._run_dir, job, "helper")
        self._say(f"job {job} is queued, to bring {count} further node{'s' * (count > 1)}")

    def _helpers(self) -> dict[str, tuple[str, list[str]]]:
        """Return state and nodes of the helper jobs that are not over."""
        noted = noted_jobs(self._run_dir, ["helper"])
        if not noted:
            return {}
        found = {}
        rows = slurm(["squeue", "--noheader", "--me", "--format=%i|%T|%N"])
        for job, state, nodes in (row.split("|") for row in rows.splitlines()):
            if job in noted:
                found[job] = (state, expand(nodes))
        for job in noted.keys() - found.keys():
            forget_job(self._run_dir, job)
        return found

    def _start_absent(self, present: Collection[str], most: int) -> int:
        """Start agents again on nodes of this job whose agent has ended; return how many agents are on their way."""
        now, on_their_way, absent = time.monotonic(), 0, []
        out = excluded_nodes(self._run_dir)
        for node in self._nodes():
            if node in present or node in out or node not in self._started:
                continue
            if now - self._started[node] < AGENT_SECONDS:
                on_their_way += 1
            else:
                absent.append(node)
        if absent:
            # SLURM takes minutes to declare a node dead, but marks it with a star (no answer) before.
            rows = slurm(["sinfo", "--noheader", "--Node", f"--nodes={','.join(absent)}", "--format=%N %t"]).split("\n")
            well = {row.split()[0] for row in rows if row and row.split()[1] in ("alloc", "mix", "comp", "idle")}
            again = [node for node in absent if node in well][:most]
            if again:
                self._start_on(again)
                on_their_way += len(again)
        return on_their_way

    def _start_on(self, nodes: list[str]) -> None:
        command = agents_command(self._launch.slurm, self._run_dir, nodes)
        # In a session of its own, so that Ctrl-C reaches the supervisor alone.
        self._agents.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True))
        self._started |= dict.fromkeys(nodes, time.monotonic())

    def _nodes(self) -> list[str]:
        """Ask SLURM for the nodes of this job now; the job's environment only knows those of its start."""
        return expand(slurm(["squeue", "--noheader", f"--jobs={self.job}", "--format=%N"]).strip())

    def _queue_next(self) -> None:
        script = RunFolder(self._run_dir).launch.job_script
        options = [f"--dependency=afternotok:{self.job}", "--kill-on-invalid-dep=yes"]
        options.append(f"--nodes={node_range(self._launch, again=True)}")
        if excluded := _excluded(self._launch, self._run_dir):
            options.append(f"--exclude={','.join(excluded)}")
        try:
            answer = slurm(["sbatch", "--parsable", *options, str(script)], environment=outside_job(options))
        except UserError as error:
            self._say(f"the run cannot go on in another job after this one: {error}")
            return
        self._next = answer.strip().split(";")[0]
        note_job(self._run_dir, self._next, "next")
        self._say(f"job {self._next} waits to go on where this one ends")

    def _end_leftovers(self) -> None:
        """Cancel jobs of an earlier start that could not cancel them, for example since its host died."""
        self._cancel([job for job in noted_jobs(self._run_dir, ["helper", "next"]) if job != self.job])

    def _cancel(self, jobs: Collection[str]) -> None:
        if jobs:
            slurm(["scancel", "--quiet", *jobs])
        for job in jobs:
            forget_job(self._run_dir, job)


def requeue(job: str, run_dir: Path, launch: LaunchConfig) -> None:
    """Let SLURM start ``job`` again, with ``launch.min_nodes`` if it has no more, and on none that the run has excluded.

    Any process of the job may call it.

    Raises:
        UserError: SLURM does not allow it.
    """
    changed = []
    if launch.min_nodes is not None:
        # From root, SLURM takes this as an order and gives the fewest; a user gets as many as are free.
        changed.append(f"NumNodes={node_range(launch, again=True)}")
    if excluded := _excluded(launch, run_dir):
        changed.append(f"ExcNodeList={','.join(excluded)}")
    with _without_sigterm():
        # All processes of the job get SIGTERM at once, this one included.
        slurm(["scontrol", "requeue", job])
        # SLURM only changes jobs that wait. So this is done now, in the seconds that it leaves between SIGTERM and SIGKILL.
        if changed:
            slurm(["scontrol", "update", f"JobId={job}", *changed])


def orphaned(run_dir: Path, launch: LaunchConfig) -> None:
    """Start the run again after the host of its batch script has died; called by a process of the job that is left.

    SLURM does not: under --no-kill the job counts as running, without a batch script.

    Raises:
        UserError: SLURM does not allow it.
    """
    for job in noted_jobs(run_dir, ["run"]):
        if launch.slurm.again == "requeue":
            requeue(job, run_dir, launch)
        else:
            slurm(["scancel", job])  # for the next job of a chain this is an end like any other


@contextlib.contextmanager
def _without_sigterm() -> Iterator[None]:
    """Survive the SIGTERM that the commands in the body cause; ignore it from then on if they succeed."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, before)
        raise


def _excluded(launch: LaunchConfig, run_dir: Path) -> list[str]:
    given = launch.slurm.exclude
    return [*([given] if given else []), *excluded_nodes(run_dir)]
