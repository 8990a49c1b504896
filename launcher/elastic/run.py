"""Run a training on many nodes from the batch host.

What may happen, the cheapest first:

* A rank dies or hangs: all ranks start again on the same nodes.
* A node is lost: one that stands by takes its place; without one, the run resumes on the remaining nodes in another layout.
* A node comes: the ranks save at once and stop, and all start on more nodes. They do not wait for the next regular
  checkpoint, which may be an hour away, while a save costs seconds. No step is lost either way.
* Too few nodes are left: the cluster starts the run again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from launcher.elastic.cluster import Cluster, Wishes
from launcher.elastic.control_server import Hub
from launcher.elastic.events import History
from launcher.elastic.layouts import team_sizes
from launcher.elastic.outlook import Report
from launcher.elastic.starts import how_it_begins, in_vain, process_start
from launcher.elastic.supervisor import Request, Supervisor
from launcher.health.node import room_problem
from launcher.workers.output import Terminal
from launcher.workers.run_progress import run_state
from launcher.workers.stop_signals import caught_signals
from megamoe.config import Config
from megamoe.core.errors import UserError
from megamoe.core.exit_status import NO_PROGRESS, STOPPED
from megamoe.model.size import model_size


def supervise(config_path: Path, overrides: Sequence[str], resume: str, settings: Config, cluster: Cluster) -> int:
    """Train until all steps are done, on the nodes that ``cluster`` gives.

    What it does stands in RUN/launch/state.json and RUN/launch/events.jsonl, see :mod:`launcher.elastic.events`.

    Args:
        config_path: config file, absolute, on a file system that all nodes share.
        overrides: ``KEY=VALUE`` settings, handed to the ranks as they are.
        resume: ``auto``, ``none`` or a checkpoint, for the first attempt.
        settings: the resolved config.
        cluster: who gives out nodes.

    Returns:
        Exit status, as of ``launch_local``; 75 also when there are too few nodes and the cluster starts the run again.

    Raises:
        UserError: no layout fits the numbers of nodes, or the run's folder cannot be written or has no room.
    """
    sizes = team_sizes(settings)
    if settings.launch.health.check != "off":
        model_size(settings)  # for room_problem: imports torch, which takes seconds, before nodes wait for answers
    run_dir, limits = settings.run.folder, settings.launch
    terminal = Terminal()
    try:
        history = History(run_dir)
        kind, since = how_it_begins(run_dir, cluster.job)
        hub = Hub(run_dir, cluster.job, limits.node_timeout, terminal)
    except OSError as error:
        raise UserError(f"run.dir {run_dir}: cannot be written ({error.strerror}); choose another run.dir") from error
    if why := room_problem(settings):
        hub.close()
        raise UserError(why)
    history.event("supervisor", host=socket.gethostname(), job=cluster.job, pid=os.getpid(), started=process_start())
    report = Report(history, hub, cluster.job)
    request = Request(config_path, overrides, settings, sizes)
    # Signals are caught to the very end: a restart by SLURM begins with signals to this process, which still has to
    # cancel what it asked the cluster for.
    with caught_signals() as caught:
        try:
            with Wishes(cluster, terminal) as wishes:
                supervisor = Supervisor(request, resume, hub, report, history, wishes, terminal, caught)
                try:
                    end = supervisor.run(cluster.start_agents(), kind, since)
                finally:
                    hub.close()  # first: an agent would take us for dead while the run is being started again
            phase = {0: "done", STOPPED: "stopped"}.get(end.status, "failed")
            status = end.status
            if end.again is not None:
                saved = run_state(run_dir, 0).saved
                if why := in_vain(run_dir, saved, limits.max_restarts + 1):
                    terminal.say(why)
                    status, phase = NO_PROGRESS, "failed"
                else:
                    accepted = cluster.run_again(end.again)
                    history.event("again", why=end.again, accepted=accepted, saved=saved)
                    if accepted:
                        terminal.say(f"{end.again}: the run is started again")
                        status, phase = STOPPED, "again"
                    else:
                        go_on = f"megamoe launch resume {run_dir}"
                        terminal.say(f"{end.again}: nobody starts the run again; go on with: {go_on}")
            report.state(phase)
        finally:
            cluster.close()
        history.event("finished", status=status)
    return status
