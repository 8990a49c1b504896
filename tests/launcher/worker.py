"""A stand-in for a rank, started by the launcher's tests: `worker.py SCRIPT train CONFIG --resume R [KEY=VALUE ...]`.

SCRIPT says what to do in each attempt, as JSON: {"ATTEMPT": {"RANK": ACTION}}; "*" stands for all others. A rank without
an action is done at once.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

rank, run = os.environ["RANK"], Path(os.environ["TEST_RUN"])
script = json.loads(sys.argv[1])
attempt = max(int(path.name[8:]) for path in (run / "logs").glob("attempt-*"))
with (run / f"seen-{attempt}-{rank}.json").open("w") as file:
    json.dump({"argv": sys.argv[2:], "env": dict(os.environ), "pid": os.getpid()}, file)


def report(status: int, message: str, **rest: object) -> None:
    """Report how this rank ends, as a real one does."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before any installed copy
    from megamoe.core.rank_end import EndKind, report_end  # not sooner: what is seen above is not to wait for it

    if "kind" in rest:
        rest["kind"] = EndKind(rest["kind"])
    report_end(status, message, **rest)


def train() -> None:
    """Steps of 50 ms until there is a file named "finish"; saves and stops when asked to, as a real rank does."""
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stop.append(number))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    steps = [int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")]
    step = max(steps, default=0)
    if rank == "0":
        kept = run / "metrics.jsonl.kept"
        kept.write_text("".join(f'{{"step":{number}}}\n' for number in range(1, step + 1)))
        kept.replace(run / "metrics.jsonl")
    while not (run / "finish").exists():
        time.sleep(0.05)
        step += 1
        if rank == "0":
            with (run / "metrics.jsonl").open("a") as metrics:
                metrics.write(f'{{"step":{step}}}\n')
        if stop:
            if rank == "0":
                (run / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
            os._exit(75)


actions = script.get(str(attempt), script.get("*", {}))
match actions.get(rank, actions.get("*", "done")):
    case "train":
        train()
    case "done":
        print(f"rank {rank} is done", flush=True)
    case "bar":
        sys.stderr.write("step 1\rstep 2\r")
        print("to stdout", flush=True)
    case "port-taken":
        report(1, "somebody listens there", kind="port_taken")
        sys.exit("a traceback's last line")
    case "refuse":
        print("megamoe: error: optim.lr 7: is silly; use 1", file=sys.stderr)
        report(2, "optim.lr 7: is silly; use 1")
        sys.exit(2)
    case "refuse-without-a-word":
        print("megamoe: error: in a log, where nobody looks", file=sys.stderr)
        sys.exit(2)
    case "tell-tales":
        print(
            "megamoe: error: optim.lr 7: is silly\nmegamoe: rank 1 hangs in step 7\ncode: -98, name: EADDRINUSE", flush=True
        )
        sys.exit(1)
    case "hang-and-end":
        print("the stacks of threads\nrank 1 hangs in other words", flush=True)
        report(76, "rank 1 hangs in step 7: waits for data", phase="waits for data", step=7)
        os._exit(76)
    case "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    case "hang-and-end-later":
        time.sleep(1)
        os._exit(76)
    case "stopped":
        os._exit(75)
    case "late":
        (run / "metrics.jsonl").write_text('{"step":7}\n')
        os._exit(143)
    case "fail-at-next-step":
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(f'{{"step":{attempt}}}\n')
        sys.exit("that step")
    case "fail-after-save":
        (run / f"checkpoints/step-{attempt:08d}").mkdir(parents=True)
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(f'{{"step":{attempt}}}\n')
        sys.exit("after the save")
    case "fail":
        sys.exit("a traceback's last line")
    case "die":
        print("the last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    case "hang":
        time.sleep(600)
    case "hang-with-child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (run / f"child-{rank}").write_text(str(child.pid))
        time.sleep(600)
    case "hang-with-semaphore":
        semaphore = multiprocessing.get_context("spawn").Semaphore()
        (run / f"semaphore-{rank}").write_text(f"{os.getpid()} {semaphore._semlock.name}")
        time.sleep(600)
    case "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (run / f"deaf-{rank}").touch()
        time.sleep(600)
    case "save":
        signal.signal(signal.SIGTERM, lambda *_: ((run / f"saved-{rank}").touch(), os._exit(75)))
        (run / f"ready-{rank}").touch()
        time.sleep(600)
