"""The local launcher against real processes: restarts, refusals, signals, orphans, logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from launcher.local.launch import launch_local
from megamoe.config.launch import LaunchConfig
from megamoe.core.errors import UserError
from megamoe.core.exit_status import NO_PROGRESS, STOPPED
from megamoe.core.run_folder import RunFolder

WORKER = Path(__file__).with_name("worker.py")
Script = dict[str, dict[str, str]]


def latest_attempt(run: Path) -> Path:
    attempt = RunFolder(run).latest_attempt()
    assert attempt is not None
    return attempt.path


def launch(run: Path, script: Script, nproc: int = 2, resume: str = "none", **limits: float) -> int:
    os.environ["TEST_RUN"] = str(run)
    command = [sys.executable, str(WORKER), json.dumps(script)]
    return launch_local(Path("c.yaml"), ["a.b=1"], nproc, resume, LaunchConfig.model_validate(limits), run, command)


def launch_apart(run: Path, script: Script, nproc: int = 2) -> subprocess.Popen[str]:
    """The launcher in a process of its own, so that it can be killed."""
    code = (
        "import sys; from pathlib import Path; from launcher.local.launch import launch_local;"
        "from megamoe.config.launch import LaunchConfig;"
        "run, worker, script, n = sys.argv[1:];"
        "limits = LaunchConfig(stop_grace=5); command = [sys.executable, worker, script];"
        "sys.exit(launch_local(Path('c'), [], int(n), 'none', limits, Path(run), command))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(run), str(WORKER), json.dumps(script), str(nproc)],
        env={**os.environ, "TEST_RUN": str(run), "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )


def seen(run: Path, attempt: int, rank: int) -> dict[str, object]:
    record: dict[str, object] = json.loads((run / f"seen-{attempt}-{rank}.json").read_text())
    return record


def wait_for(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def pids(run: Path, names: Iterable[str]) -> list[int]:
    wait_for(lambda: all((run / name).exists() and (run / name).stat().st_size > 0 for name in names))
    workers = json.loads((latest_attempt(run) / "pids.json").read_text())
    return [*workers.values(), *(int((run / name).read_text()) for name in names)]


def test_all_ranks_done_is_exit_0_and_each_rank_knows_its_place(tmp_path: Path) -> None:
    assert launch(tmp_path, {}, nproc=3) == 0
    ports = set()
    for rank in range(3):
        record = seen(tmp_path, 1, rank)
        env = record["env"]
        assert isinstance(env, dict)
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == (
            str(rank),
            str(rank),
            "3",
            "3",
        )
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert int(env["OMP_NUM_THREADS"]) >= 1
        ports.add(env["MASTER_PORT"])
        assert record["argv"] == ["train", "c.yaml", "--resume", "none", "a.b=1"]
        assert (tmp_path / f"logs/attempt-1/rank-{rank:05d}.log").read_text() == f"rank {rank} is done\n"
    assert len(ports) == 1
    assert json.loads((tmp_path / "logs/attempt-1/pids.json").read_text())["2"] == seen(tmp_path, 1, 2)["pid"]


def test_kill_9_of_one_rank_restarts_all_from_the_last_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, {"1": {"0": "hang", "1": "die"}}) == 0
    argv = seen(tmp_path, 2, 0)["argv"]
    assert isinstance(argv, list) and argv[argv.index("--resume") + 1] == "auto"
    error = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL" in error and "the last words" in error
    assert "restart 1 of at most 3" in error
    assert not alive(int(str(seen(tmp_path, 1, 0)["pid"])))


def test_gives_up_after_max_restarts_with_exit_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    always = {str(attempt): {"1": "fail"} for attempt in range(1, 9)}
    assert launch(tmp_path, always, max_restarts=2, max_restarts_without_progress=9) == 1
    assert latest_attempt(tmp_path) == tmp_path / "logs/attempt-3"
    error = capfd.readouterr().err
    assert "rank 1 ended with status 1" in error and "a traceback's last line" in error
    assert "giving up after 2 restarts" in error


@pytest.mark.parametrize("ranks", [("0",), ("1",), ("0", "1")])
def test_a_wrong_request_is_not_retried_and_said_once(
    ranks: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = {"1": {"0": "hang", "1": "hang", **{rank: "refuse" for rank in ranks}}}
    assert launch(tmp_path, script) == 2
    assert capfd.readouterr().err == "megamoe: error: optim.lr 7: is silly; use 1\n"
    assert latest_attempt(tmp_path) == tmp_path / "logs/attempt-1"


def test_a_rank_that_refused_without_a_report_is_named_whatever_its_log_says(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, {"1": {"0": "hang", "1": "refuse-without-a-word"}}) == 2
    log = tmp_path / "logs/attempt-1/rank-00001.log"
    assert "megamoe: error: in a log" in log.read_text()
    assert capfd.readouterr().err == f"megamoe: error: rank 1 refused the request without a word, see {log}\n"


def test_the_words_of_a_log_decide_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(tmp_path, {"1": {"0": "tell-tales", "1": "tell-tales"}}, max_restarts=1) == 0
    error = capfd.readouterr().err
    assert "restart 1 of at most 1" in error and "ended with status 1" in error


def test_a_report_of_an_older_attempt_is_not_believed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs/attempt-1").mkdir(parents=True)
    old = {"kind": "request_is_wrong", "status": 2, "message": "was wrong", "pid": 1, "phase": None, "step": None}
    (tmp_path / "logs/attempt-1/rank-00001.end.json").write_text(json.dumps(old))
    assert launch(tmp_path, {"2": {"0": "hang", "1": "die"}}) == 0
    error = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL" in error and "was wrong" not in error
    assert not (tmp_path / "logs/attempt-2/rank-00001.end.json").exists(), "who is killed leaves no report"


def test_the_rank_that_was_killed_is_blamed_not_the_peers_that_followed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, {"1": {"0": "fail", "1": "fail", "2": "die"}}, nproc=3) == 0
    assert "rank 2 was killed by SIGKILL" in capfd.readouterr().err


def test_output_of_rank_0_reaches_the_terminal_as_it_is_and_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, {"1": {"0": "bar"}}) == 0
    captured = capfd.readouterr()
    assert captured.err == "step 1\rstep 2\r" and captured.out == "to stdout\n"
    log = (tmp_path / "logs/attempt-1/rank-00000.log").read_bytes()
    assert b"step 1\rstep 2\r" in log and b"to stdout\n" in log


def test_restarts_that_come_no_further_end_with_a_status_of_their_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = {"1": {"1": "fail-at-next-step"}, **{str(attempt): {"1": "fail"} for attempt in range(2, 9)}}
    assert launch(tmp_path, script, max_restarts=9) == NO_PROGRESS
    assert latest_attempt(tmp_path) == tmp_path / "logs/attempt-3"
    error = capfd.readouterr().err
    ends = ", then ".join(["rank 1 ended with status 1"] * 3)
    assert f"no progress: 2 restarts in a row came no further than step 1 ({ends}); the logs are in" in error


def test_restarts_that_come_further_but_never_to_a_checkpoint_end_with_1(tmp_path: Path) -> None:
    always = {str(attempt): {"1": "fail-at-next-step"} for attempt in range(1, 20)}
    assert launch(tmp_path, always, max_restarts=4) == 1
    assert latest_attempt(tmp_path) == tmp_path / "logs/attempt-5"


def test_a_new_checkpoint_makes_the_count_of_restarts_begin_anew(tmp_path: Path) -> None:
    assert launch(tmp_path, {str(attempt): {"1": "fail-after-save"} for attempt in range(1, 5)}, max_restarts=1) == 0
    assert latest_attempt(tmp_path) == tmp_path / "logs/attempt-5"


def test_a_hang_is_told_by_its_own_line_and_restarted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(tmp_path, {"1": {"0": "fail", "1": "hang-and-end"}}) == 0
    error = capfd.readouterr().err
    assert "megamoe: rank 1 hangs in step 7: waits for data, log " in error and "restart 1" in error


def test_a_frozen_rank_is_named_and_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(tmp_path, {"1": {"0": "freeze", "1": "hang-and-end-later"}}) == 0
    assert "rank 0 is stopped (its main process; SIGSTOP" in capfd.readouterr().err
    assert not alive(int(str(seen(tmp_path, 1, 0)["pid"])))


@pytest.mark.parametrize(("how", "status"), [("stopped", STOPPED), ("late", 143)])
def test_a_rank_that_was_asked_to_stop_takes_the_others_along_and_is_not_restarted(
    how: str, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, {"1": {"0": "hang", "1": how}}) == status
    assert latest_attempt(tmp_path) == tmp_path / "logs/attempt-1"
    assert "a rank was asked to stop: all save and stop" in capfd.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_the_ranks_after_they_have_saved(signum: signal.Signals, tmp_path: Path) -> None:
    launcher = launch_apart(tmp_path, {"1": {"0": "save", "1": "save"}})
    wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)))
    launcher.send_signal(signum)
    _, error = launcher.communicate(timeout=15)
    assert launcher.returncode == STOPPED
    assert signum.name in error and "Traceback" not in error
    assert "go on with: megamoe train c --nproc 2 --resume auto" in error
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))


def test_a_second_signal_ends_ranks_that_do_not_listen(tmp_path: Path) -> None:
    launcher = launch_apart(tmp_path, {"1": {"0": "deaf", "1": "deaf"}})
    wait_for(lambda: all((tmp_path / f"deaf-{rank}").exists() for rank in (0, 1)))
    workers = pids(tmp_path, [])
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.2)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=15) == 130
    assert not any(map(alive, workers))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_launcher_however_it_ends(signum: signal.Signals, tmp_path: Path) -> None:
    launcher = launch_apart(tmp_path, {"1": {"0": "hang-with-child", "1": "hang-with-child"}})
    everyone = pids(tmp_path, ["child-0", "child-1"])
    assert len(everyone) == 4 and all(map(alive, everyone))
    launcher.send_signal(signum)
    launcher.communicate(timeout=15)
    wait_for(lambda: not any(map(alive, everyone)), seconds=5)


def test_when_all_ranks_are_frozen_nobody_waits_for_ever(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.environ["TEST_RUN"] = str(tmp_path)
    command = [sys.executable, str(WORKER), json.dumps({"1": {"0": "freeze", "1": "freeze"}})]
    limits = LaunchConfig(max_restarts=1)
    assert launch_local(Path("c.yaml"), [], 2, "none", limits, tmp_path, command, watchdog_seconds=0.5) == 0
    error = capfd.readouterr().err
    assert "rank 0 is stopped (its main process" in error and "rank 1 is stopped (its main process" in error
    assert "restart 1 of at most 1" in error
    assert not alive(seen(tmp_path, 1, 0)["pid"]) and not alive(seen(tmp_path, 1, 1)["pid"])


def test_the_children_of_a_killed_rank_go_with_it(tmp_path: Path) -> None:
    launcher = launch_apart(tmp_path, {"1": {"0": "hang-with-child", "1": "hang"}})
    everyone = pids(tmp_path, ["child-0"])
    os.kill(everyone[0], signal.SIGKILL)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 0
    assert not any(map(alive, everyone))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm here")
@pytest.mark.parametrize("victim", ["the launcher", "a rank"])
def test_a_kill_leaves_nothing_in_shared_memory(tmp_path: Path, victim: str) -> None:
    launcher = launch_apart(tmp_path, {"1": {"0": "hang-with-semaphore", "1": "hang"}})
    note = tmp_path / "semaphore-0"
    wait_for(lambda: note.exists() and note.stat().st_size > 0)
    holder, name = note.read_text().split()
    semaphore = Path("/dev/shm") / f"sem.{name.removeprefix('/')}"
    assert semaphore.exists()
    if victim == "the launcher":
        launcher.kill()
    else:
        os.kill(json.loads((latest_attempt(tmp_path) / "pids.json").read_text())["1"], signal.SIGKILL)
    launcher.communicate(timeout=20)
    wait_for(lambda: not alive(int(holder)) and not semaphore.exists())


def test_after_resume_from_a_path_a_restart_ignores_checkpoints_of_the_old_history(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-00000300").mkdir(parents=True)
    os.utime(tmp_path / "checkpoints/step-00000300", (1, 1))
    path = str(tmp_path / "checkpoints/step-00000100")
    assert launch(tmp_path, {"1": {"1": "die"}}, resume=path) == 0
    argv = seen(tmp_path, 2, 0)["argv"]
    assert isinstance(argv, list) and argv[argv.index("--resume") + 1] == path


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run\.dir .*file.* cannot be written"):
        launch(tmp_path / "file", {})
