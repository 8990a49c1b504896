"""An agent as a process of its own: `agent_process.py RUN NODE JOB HOOK PROBLEMS COMMAND...`. HOOK is a file to be written
when the run is to be started again."""

import sys
from pathlib import Path

from launcher.elastic.agent import run_agent

run, node, job, hook, problems, *command = sys.argv[1:]
sys.exit(
    run_agent(
        Path(run),
        node,
        job,
        command=command,
        checks=lambda: [problems] if problems else [],
        orphaned=Path(hook).write_text,
        patience=20,
    )
)
