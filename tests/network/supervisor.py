"""A supervisor, as a process, over agents on several hosts: `supervisor.py RUN CONFIG SPEC [KEY=VALUE ...]`.

SPEC is {"hosts": {NODE: process id in its namespace}, "command": what the agents start}, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from launcher.elastic.run import supervise
from megamoe.config import load_config

AGENT = """
import sys
from pathlib import Path
from launcher.elastic.agent import run_agent
from launcher.health.node import node_problems
from megamoe.config import load_config
run, node, config, overrides, *command = sys.argv[1:]
limits = load_config(Path(config), overrides.split()).launch
checks = lambda: [str(each) for each in node_problems(node, Path(run), limits)]
sys.exit(run_agent(Path(run), node, "1", command=command, checks=checks, patience=120))
"""


class HostCluster:
    """Starts an agent on each host."""

    job = "1"

    def __init__(self, run: Path, config: str, overrides: list[str], hosts: dict[str, int], command: list[str]) -> None:
        self._run, self._arguments, self._hosts, self._command = run, [config, " ".join(overrides)], hosts, command

    def start_agents(self) -> int:
        for node, pid in self._hosts.items():
            inside = ["nsenter", "--net", f"--target={pid}", "--"]
            agent = [sys.executable, "-c", AGENT, str(self._run), node, *self._arguments, *self._command]
            # What it says goes where a job's output would go.
            with (self._run / f"agent-{node}.log").open("w") as log:
                subprocess.Popen([*inside, *agent], env=os.environ, stderr=log, start_new_session=True)
        return len(self._hosts)

    def nodes_present(self, nodes: Collection[str]) -> None: ...
    def ask_for_nodes(self, count: int) -> None: ...

    def run_again(self, why: str) -> bool:
        return False

    def exclude(self, node: str, why: str) -> None:
        with (self._run / "excluded").open("a") as file:
            file.write(f"{node}\n")

    def close(self) -> None: ...


if __name__ == "__main__":
    run, config, spec, *overrides = sys.argv[1:]
    settings = load_config(Path(config), overrides)
    cluster = HostCluster(Path(run), config, overrides, **json.loads(spec))
    sys.exit(supervise(Path(config), overrides, "none", settings, cluster))
