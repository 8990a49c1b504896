"""Ranks that start at once: forked from a process that has imported torch and DeepSpeed, which takes seconds per rank.

They are real processes with an environment as torchrun sets it, and run the command or a script of tests/faults as if it
had just been started. What is not tested this way is the start itself: tests of the launcher and of what kills and hangs
start ranks as users do.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_ranks(
    argv: Sequence[str], envs: Sequence[Mapping[str, str]], folder: Path, timeout: float
) -> list[tuple[int, str]]:
    """Run ``argv`` (``megamoe ...`` or ``script.py ...``) in ``folder``, one process for each environment.

    Returns:
        (status, what it wrote to stdout and stderr) of each; those that run longer than ``timeout`` are killed.
    """
    with tempfile.TemporaryDirectory() as logs:
        paths = [f"{logs}/{number}" for number in range(len(envs))]
        request = {"argv": list(argv), "envs": [dict(env) for env in envs], "cwd": str(folder), "logs": paths}
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request | {"timeout": timeout}).encode() + b"\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline())
        return [(status, Path(path).read_text(errors="replace")) for status, path in zip(statuses, paths, strict=True)]


@cache
def _server() -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm"], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()


def main() -> None:
    """Serve requests, one per line, until the end of input; in a forked child: run as it says and end."""
    for module in ("megamoe.train.trainer", "megamoe.cli", "torch._dynamo"):
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    requests = os.fdopen(os.dup(0), "rb", buffering=0)  # a forked child must not find the server's input in a buffer
    answers = os.dup(1)
    while line := requests.readline():
        request = json.loads(line)
        children = []
        for env, log in zip(request["envs"], request["logs"], strict=True):
            child = os.fork()
            if child == 0:
                requests.close()
                os.close(answers)
                _become(request["argv"], env, request["cwd"], log)
                if request["argv"][0] == "megamoe":
                    sys.modules["megamoe.cli"].main(request["argv"][1:])
                runpy.run_path(request["argv"][0], run_name="__main__")
                return
            children.append(child)
        os.write(answers, json.dumps(_wait(children, time.monotonic() + request["timeout"])).encode() + b"\n")


def _become(argv: list[str], env: dict[str, str], folder: str, log: str) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = argv
    for target, path in enumerate((os.devnull, log, log)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, target)
        os.close(descriptor)


def _wait(children: list[int], deadline: float) -> list[int]:
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for child in set(children) - set(statuses):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[child] for child in children]


if __name__ == "__main__":
    main()
