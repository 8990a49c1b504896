"""Nodes that are local processes, and a supervisor over them in a process of its own.

`local_cluster.py RUN CONFIG RESUME SPEC [KEY=VALUE ...]` supervises a run; SPEC is for :class:`LocalCluster`, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.training import ROOT

HERE = Path(__file__).parent


class LocalCluster:
    """Starts agents as processes.

    Args:
        run: the run's folder; what was asked for is in cluster.jsonl there, process ids in agent-NODE.
        nodes: of the allocation.
        reserve: nodes that come when further ones are asked for.
        again: what run_again says.
        problems: what the checks of a node find.
        command: what the agents start.
    """

    def __init__(
        self,
        run: Path,
        nodes: Sequence[str],
        reserve: Sequence[str] = (),
        again: bool = True,
        problems: dict[str, str] | None = None,
        command: Sequence[str] = (sys.executable, "-m", "megamoe"),
    ) -> None:
        self.job = "1"
        self._run, self._nodes, self._reserve, self._again = run, nodes, list(reserve), again
        self._problems, self._command = problems or {}, list(command)

    def start_agents(self) -> int:
        self._note("start_agents")
        for node in self._nodes:
            start_agent(self._run, node, self.job, self._command, self._problems.get(node, ""))
        return len(self._nodes)

    def nodes_present(self, nodes: Collection[str]) -> None:
        """Its tests do not ask about it."""

    def ask_for_nodes(self, count: int) -> None:
        self._note("ask_for_nodes", count)
        for node in self._reserve[:count]:
            start_agent(self._run, node, "2", self._command)
        del self._reserve[:count]

    def run_again(self, why: str) -> bool:
        self._note("run_again", why)
        return self._again

    def exclude(self, node: str, why: str) -> None:
        self._note("exclude", node, why)

    def close(self) -> None:
        self._note("close")

    def _note(self, *what: object) -> None:
        with (self._run / "cluster.jsonl").open("a") as file:
            file.write(json.dumps(what) + "\n")


def start_agent(run: Path, node: str, job: str, command: Sequence[str], problems: str = "") -> None:
    hook = str(run / "orphaned")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "agent_process.py"), str(run), node, job, hook, problems, *command],
        # Threads of several ranks that wait for each other on two cores make all of them ten times slower.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    (run / f"agent-{node}").write_text(str(process.pid))


class Supervised:
    """A run under a supervisor that is a process."""

    def __init__(self, process: subprocess.Popen[str], run: Path, command: Sequence[str]) -> None:
        self.process, self.run, self._command = process, run, command

    def events(self, event: str) -> list[dict[str, Any]]:
        path = self.run / "launch/events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [each for each in map(json.loads, lines) if each["event"] == event]

    def attempts(self) -> list[tuple[str, list[str]]]:
        return [(each["detail"]["kind"], each["detail"]["nodes"]) for each in self.events("attempt")]

    def asked(self, what: str) -> list[list[Any]]:
        lines = map(json.loads, (self.run / "cluster.jsonl").read_text().splitlines())
        return [args for name, *args in lines if name == what]

    def agent(self, node: str) -> int:
        return int((self.run / f"agent-{node}").read_text())

    def rank(self, rank: int) -> int:
        newest = max(self.run.glob("logs/*/pids.json"), key=lambda path: int(path.parent.name[8:]))
        return int(json.loads(newest.read_text())[str(rank)])

    def kill_node(self, node: str) -> None:
        os.kill(self.agent(node), signal.SIGKILL)

    def bring(self, node: str, job: str = "2") -> None:
        start_agent(self.run, node, job, self._command)

    def until(self, condition: Callable[[], object], seconds: float = 480) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended too early: {self.process.communicate()[1]}"
            assert time.monotonic() < deadline, f"waited in vain: {(self.run / 'launch/events.jsonl').read_text()}"
            time.sleep(0.02)

    def until_step_of_attempt(self, attempt: int) -> None:
        """Wait for the first step of an attempt."""
        self.until(lambda: len(self.attempts()) >= attempt and (last := self._last()) == "step" and last)

    def _last(self) -> str:
        lines = (self.run / "launch/events.jsonl").read_text().splitlines()
        marks = [json.loads(line)["event"] for line in lines]
        return [mark for mark in marks if mark in ("attempt", "step", "ended")][-1]

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=480)
        return self.process.returncode, said


@contextmanager
def supervised(
    folder: Path, run: Path, config: Path, *overrides: str, resume: str = "none", **spec: object
) -> Iterator[Supervised]:
    command = spec.get("command", [sys.executable, "-m", "megamoe"])
    assert isinstance(command, list)
    run.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, __file__, str(run), str(config), resume, json.dumps(spec), f"run.dir={run}", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TEST_RUN": str(run)},
        stderr=subprocess.PIPE,
        text=True,
    )
    os.environ["TEST_RUN"] = str(run)  # for agents that tests start
    try:
        yield Supervised(process, run, command)
    finally:
        process.kill()
        for path in run.glob("agent-*"):
            try:
                os.kill(int(path.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue


def main() -> int:
    from launcher.elastic.run import supervise
    from megamoe.config import load_config

    run, config, resume, spec, *overrides = sys.argv[1:]
    settings = load_config(Path(config), overrides)
    return supervise(Path(config), overrides, resume, settings, LocalCluster(Path(run), **json.loads(spec)))


if __name__ == "__main__":
    sys.exit(main())
