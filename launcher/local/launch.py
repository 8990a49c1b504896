"""Run a training on this machine: N processes, restarted together from the last checkpoint when one dies or hangs."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.workers.ending import PEER_GRACE, explain, last_words, new_attempt, resume_after
from launcher.workers.guard import Guard
from launcher.workers.output import Terminal
from launcher.workers.processes import Ranks, local_environments, write_pids
from launcher.workers.rank_group import POLL
from launcher.workers.run_progress import Restarts, run_state
from launcher.workers.stop import asked_to_stop, stop_ranks, stop_status, stop_words
from launcher.workers.stop_signals import caught_signals
from launcher.workers.suspended import AllStopped
from megamoe.config.launch import LaunchConfig
from megamoe.core.exit_status import HUNG


def launch_local(
    config_path: Path,
    overrides: Sequence[str],
    nproc: int,
    resume: str,
    limits: LaunchConfig,
    run_dir: Path,
    command: Sequence[str] = (sys.executable, "-m", "megamoe"),
    watchdog_seconds: float = 0.0,
) -> int:
    """Run ``COMMAND train CONFIG --resume RESUME OVERRIDES`` as ``nproc`` ranks until all of them are done.

    When a rank dies or hangs, the others are ended and all start again with ``--resume auto``, as often as ``limits``
    allow. The logs of attempt A are in RUN/logs/attempt-A, with the process ids in pids.json. SIGINT, SIGTERM, SIGHUP
    and SIGUSR1 make the ranks save and stop; SIGINT on top of that ends them at once. No process is left behind,
    whatever ends this one.

    Args:
        config_path: config file, handed to the ranks as it is.
        overrides: ``KEY=VALUE`` settings, handed to the ranks as they are.
        nproc: number of ranks.
        resume: ``auto``, ``none`` or a checkpoint, for the first attempt.
        limits: how often to restart, and how long the ranks have to save when they are stopped.
        run_dir: the run's folder (``config.run.folder``).
        command: what to start in place of this Python's ``megamoe``.
        watchdog_seconds: all ranks stopped (SIGSTOP) for so long are a hang; 0: never.

    Returns:
        Exit status: 0 all ranks are done; 2 a rank said that the request is wrong, its line is on stderr; 75 stopped,
        and nothing is lost; 128 + signal: stopped without a save; 77 restarts bring no progress; 1 a rank failed and no
        restart was left.

    Raises:
        UserError: the run's folder cannot be written.
    """
    terminal = Terminal()
    launched = time.time()
    restarts = Restarts(limits)
    with Guard() as guard, caught_signals() as caught:
        while True:
            arguments = [*command, "train", str(config_path), "--resume", resume, *overrides]
            folder = new_attempt(run_dir)
            with Ranks(arguments, local_environments(nproc), folder, terminal, guard) as ranks:
                write_pids(folder, ranks.pids)
                stopped, hang = AllStopped(ranks.pids.values(), watchdog_seconds), False
                while ranks.running() and not caught and not (hang := stopped.too_long(POLL)):
                    ranks.pause(POLL)
                # If all ranks are stopped, no watchdog is left that could say what hangs: then any rank stands for all.
                culprit = ranks.culprit() or ((0, HUNG) if hang else None)
                stop = bool(caught) or asked_to_stop(ranks)
                if stop:
                    terminal.say(stop_words(caught.received))
                    by_themselves = stop_ranks(ranks, lambda: caught.received, limits.stop_grace + PEER_GRACE)
                elif culprit is not None:
                    frozen = last_words(ranks, culprit[1])
            state = run_state(run_dir, launched)
            resume = resume_after(resume, state.checkpoint)
            if stop:
                status, words = stop_status(ranks.ended().values(), caught.received, by_themselves, state)
                if words:
                    typed = ["megamoe", "train", str(config_path), "--nproc", str(nproc), "--resume", resume, *overrides]
                    terminal.say(f"{words}; go on with: {shlex.join(typed)}")
                return status
            if culprit is None:
                return 0
            explain(ranks, culprit, frozen, terminal)
            verdict = restarts.after(state, culprit, f"all {nproc} ranks with --resume {resume}", run_dir)
            restarts = verdict.restarts
            if verdict.words:
                terminal.say(verdict.words)
            if verdict.status is not None:
                return verdict.status
