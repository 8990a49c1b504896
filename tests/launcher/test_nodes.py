"""The supervisor and its agents: real processes, with a stand-in for the ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from launcher.elastic.events import recoveries
from launcher.elastic.invitation import read_invitation
from megamoe.core.exit_status import STOPPED
from tests.launcher.local_cluster import Supervised, supervised
from tests.launcher.test_local import WORKER, alive, seen, wait_for
from tests.training import small_config, write_config

TRAIN = {"*": {"*": "train"}}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(
        tmp_path,
        small_config(
            train={"global_batch": 12},
            launch={
                "nodes": 2,
                "max_restarts": 3,
                "node_timeout": 6.0,
                "stop_grace": 10.0,
                "health": {"check": "quick"},
            },
        ),
    )


def worker(script: object) -> list[str]:
    return [sys.executable, str(WORKER), json.dumps(script)]


def finish(run: Supervised) -> None:
    """Let the ranks end; the run is to be all right."""
    (run.run / "finish").touch()
    status, said = run.end()
    assert status == 0, said
    wait_for(lambda: not any(alive(int(path.read_text())) for path in run.run.glob("agent-*")))
    state = json.loads((run.run / "launch/state.json").read_text())
    assert state["phase"] == "done" and not (run.run / "launch/supervisor.json").exists()


def test_each_rank_knows_its_place_among_the_nodes(config: Path, tmp_path: Path) -> None:
    spec = {"nodes": ["n2", "n10"], "command": worker({})}
    with supervised(tmp_path, tmp_path / "run", config, "launch.ranks_per_node=2", **spec) as run:
        status, said = run.end()
    assert status == 0, said
    assert run.attempts() == [("start", ["n2", "n10"])]
    assert "rank 0 is done" in said or (run.run / "logs/attempt-1/rank-00000.log").read_text() == "rank 0 is done\n"
    environments = [seen(run.run, 1, rank)["env"] for rank in range(4)]
    for rank, env in enumerate(environments):
        assert isinstance(env, dict)
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK")
        assert [env[name] for name in names] == [str(rank), str(rank % 2), "4", "2", str(rank // 2), str(rank // 2)]
        assert env["MASTER_ADDR"] == environments[0]["MASTER_ADDR"] and env["MASTER_PORT"] == environments[0]["MASTER_PORT"]
        assert env["GLOO_SOCKET_IFNAME"] and env["NCCL_SOCKET_IFNAME"] == "=" + env["GLOO_SOCKET_IFNAME"]
    argv = seen(run.run, 1, 3)["argv"]
    assert isinstance(argv, list) and argv[-2:] == ["parallel.pipeline=1", "parallel.expert=1"]


def test_a_rank_that_dies_restarts_all_on_the_same_nodes(config: Path, tmp_path: Path) -> None:
    with supervised(tmp_path, tmp_path / "run", config, nodes=["n1", "n2"], command=worker(TRAIN)) as run:
        run.until_step_of_attempt(1)
        os.kill(run.rank(1), signal.SIGKILL)
        run.until_step_of_attempt(2)
        finish(run)
    assert run.attempts() == [("start", ["n1", "n2"]), ("rank", ["n1", "n2"])]
    (failed,) = run.events("failed")
    assert failed["node"] == "n2" and failed["detail"] == {"rank": 1, "how": "was killed by SIGKILL"}
    (recovery,) = recoveries(run.run)
    assert recovery.kind == "rank" and 0 < recovery.seconds < 30


def test_a_port_that_somebody_took_and_a_hang_are_told_apart_from_a_failure(config: Path, tmp_path: Path) -> None:
    script = {"1": {"0": "port-taken", "1": "hang"}, "2": {"0": "hang", "1": "hang-and-end"}, **TRAIN}
    with supervised(
        tmp_path, tmp_path / "run", config, "launch.max_restarts=1", nodes=["n1", "n2"], command=worker(script)
    ) as run:
        run.until_step_of_attempt(3)
        (run.run / "finish").touch()
        status, said = run.end()
    assert status == 0, said
    assert [kind for kind, _ in run.attempts()] == ["start", "port", "hang"]
    ports = {seen(run.run, attempt, 1)["env"]["MASTER_PORT"] for attempt in (1, 2, 3)}  # type: ignore[index]
    assert len(ports) == 3 and "rank 1 hangs in step 7: waits for data" in said and "restart 1 of at most 1" in said


def test_a_log_that_speaks_of_a_taken_port_costs_a_restart_like_any_other_failure(config: Path, tmp_path: Path) -> None:
    script = {"1": {"0": "tell-tales", "1": "hang"}}
    with supervised(
        tmp_path, tmp_path / "run", config, "launch.max_restarts=0", nodes=["n1", "n2"], command=worker(script)
    ) as run:
        status, said = run.end()
    assert status == 1 and len(run.attempts()) == 1 and "giving up after 0 restarts" in said


def test_a_wrong_request_is_said_once_and_not_repeated(config: Path, tmp_path: Path) -> None:
    script = {"1": {"0": "hang", "1": "refuse"}}
    with supervised(tmp_path, tmp_path / "run", config, nodes=["n1", "n2"], command=worker(script)) as run:
        status, said = run.end()
    assert status == 2 and len(run.attempts()) == 1
    assert said.endswith("megamoe: error: optim.lr 7: is silly; use 1\n")


def test_a_lost_node_is_replaced_by_a_spare_at_once(config: Path, tmp_path: Path) -> None:
    with supervised(
        tmp_path, tmp_path / "run", config, "launch.spares=1", nodes=["n1", "n2", "n3"], command=worker(TRAIN)
    ) as run:
        run.until_step_of_attempt(1)
        run.until(lambda: len(run.events("joined")) == 3)
        (_, before), *_ = run.attempts()
        ranks = [run.rank(0), run.rank(1)]
        run.kill_node(before[0])
        run.until_step_of_attempt(2)
        assert not any(map(alive, ranks))
        finish(run)
    kind, after = run.attempts()[1]
    assert kind == "spare" and before[0] not in after and before[1] in after
    assert run.asked("ask_for_nodes")[-1] == [1]
    assert run.events("failed") == []  # no rank is to blame


def test_without_a_spare_the_run_shrinks_and_grows_when_the_node_returns(config: Path, tmp_path: Path) -> None:
    with supervised(tmp_path, tmp_path / "run", config, nodes=["n1", "n2"], command=worker(TRAIN)) as run:
        run.until_step_of_attempt(1)
        run.kill_node("n1")
        run.until_step_of_attempt(2)
        run.bring("n1")
        run.until_step_of_attempt(3)
        finish(run)
    assert run.attempts() == [("start", ["n1", "n2"]), ("shrink", ["n2"]), ("grow", ["n1", "n2"])]
    assert run.asked("ask_for_nodes") == [[1], [0]]
    saved = max(int(path.name[5:]) for path in run.run.glob("checkpoints/step-*"))
    assert run.events("step")[2]["step"] > saved  # the save for growing is what it went on from
    assert [each.kind for each in recoveries(run.run)] == ["shrink", "grow"]


def test_nodes_that_are_asked_for_join_in(config: Path, tmp_path: Path) -> None:
    spec = {"nodes": ["n1"], "reserve": ["n2"], "command": worker(TRAIN)}
    with supervised(tmp_path, tmp_path / "run", config, **spec) as run:
        run.until(lambda: len(run.attempts()) == 2)
        run.until_step_of_attempt(2)
        # Their job is told to stop: only they leave, with all steps saved.
        os.kill(run.agent("n2"), signal.SIGTERM)
        run.until(lambda: len(run.attempts()) == 3)
        run.until_step_of_attempt(3)
        finish(run)
    assert run.attempts() == [("start", ["n1"]), ("grow", ["n1", "n2"]), ("leave", ["n1"])]


def test_with_too_few_nodes_the_run_is_started_again(config: Path, tmp_path: Path) -> None:
    with supervised(
        tmp_path, tmp_path / "run", config, "launch.min_nodes=2", nodes=["n1", "n2"], command=worker(TRAIN)
    ) as run:
        run.until_step_of_attempt(1)
        run.kill_node("n2")
        status, said = run.end()
        assert status == STOPPED, said
        wait_for(lambda: not alive(run.agent("n1")))
    assert run.asked("run_again") == [["only 1 nodes are left, and the run needs 2"]]
    assert json.loads((run.run / "launch/state.json").read_text())["phase"] == "again"
    with supervised(tmp_path, tmp_path / "run", config, resume="auto", nodes=["n1", "n2"], command=worker({})) as run:
        run.end()
    assert run.attempts()[-1] == ("again", ["n1", "n2"])


@pytest.mark.parametrize(
    ("whom", "signum", "again"),
    [
        ("agent", signal.SIGUSR1, [["SIGUSR1"]]),  # scancel without --batch
        ("agent", signal.SIGTERM, [["SIGTERM for the nodes alone (preemption)"]]),
        ("supervisor", signal.SIGUSR1, [["SIGUSR1"]]),
        ("supervisor", signal.SIGTERM, []),
        ("both", signal.SIGTERM, []),  # scancel, scontrol requeue
    ],
)
def test_a_signal_lets_all_save_and_a_time_limit_or_preemption_starts_the_run_again(
    whom: str, signum: signal.Signals, again: list[list[str]], config: Path, tmp_path: Path
) -> None:
    with supervised(tmp_path, tmp_path / "run", config, nodes=["n1", "n2"], command=worker(TRAIN)) as run:
        run.until_step_of_attempt(1)
        if whom != "supervisor":
            os.kill(run.agent("n2"), signum)
        if whom != "agent":
            os.kill(run.process.pid, signum)
        status, said = run.end()
    assert status == STOPPED, said
    assert run.asked("run_again") == again
    assert len(list(run.run.glob("checkpoints/step-*"))) == 1 and "saved at step" in said


def test_agents_end_all_when_the_supervisor_is_killed_and_one_has_the_run_started_again(
    config: Path, tmp_path: Path
) -> None:
    with supervised(tmp_path, tmp_path / "run", config, nodes=["n1", "n2"], command=worker(TRAIN)) as run:
        run.until_step_of_attempt(1)
        ranks = [run.rank(0), run.rank(1)]
        run.process.kill()
        wait_for(lambda: not any(map(alive, ranks)), seconds=10)
        wait_for((run.run / "orphaned").exists, seconds=60)
        wait_for(lambda: not alive(run.agent("n1")) and not alive(run.agent("n2")), seconds=60)
    assert "is dead, says n" in (run.run / "orphaned").read_text()
    assert len(list(run.run.glob("launch/orphaned-*"))) == 1
    (run.run / "finish").touch()
    with supervised(tmp_path, tmp_path / "run", config, resume="auto", nodes=["n1", "n2"], command=worker(TRAIN)) as run:
        assert run.end()[0] == 0
    assert run.attempts()[-1][0] == "host"


def test_a_frozen_agent_is_lost_after_a_while_and_taken_back_when_it_goes_on(config: Path, tmp_path: Path) -> None:
    with supervised(tmp_path, tmp_path / "run", config, nodes=["n1", "n2"], command=worker(TRAIN)) as run:
        run.until_step_of_attempt(1)
        rank = run.rank(1)
        os.kill(run.agent("n2"), signal.SIGSTOP)
        run.until(lambda: len(run.attempts()) == 2)
        run.until_step_of_attempt(2)
        os.kill(run.agent("n2"), signal.SIGCONT)
        run.until(lambda: len(run.attempts()) == 3)
        assert not alive(rank)
        run.until_step_of_attempt(3)
        finish(run)
    assert [kind for kind, _ in run.attempts()] == ["start", "shrink", "grow"]
    assert "no sign of life for 6 s" in run.events("lost")[0]["detail"]["why"]


def test_a_node_with_problems_is_named_and_excluded(config: Path, tmp_path: Path) -> None:
    spec = {"nodes": ["n1", "n2"], "problems": {"n2": "/tmp has 3 MB left"}, "command": worker({})}
    with supervised(tmp_path, tmp_path / "run", config, **spec) as run:
        status, said = run.end()
    assert status == 0, said
    assert run.attempts() == [("start", ["n1"])]
    assert run.asked("exclude") == [["n2", "/tmp has 3 MB left"]] and "node n2 is not used any more: /tmp has 3 MB" in said


def test_a_run_that_takes_its_nodes_down_is_not_kept_going(config: Path, tmp_path: Path) -> None:
    with supervised(
        tmp_path, tmp_path / "run", config, "launch.max_restarts=1", nodes=["n1"], command=worker({"*": {"*": "hang"}})
    ) as run:
        for attempt in (1, 2):
            run.until(lambda attempt=attempt: (run.run / f"logs/attempt-{attempt}/pids.json").exists())
            run.kill_node("n1")
            run.until(lambda attempt=attempt: len(run.events("lost")) == attempt)
            if attempt == 1:
                run.bring("n1", job="1")
        status, said = run.end()
    assert run.asked("exclude") == [["n1", "lost 2 times since the last checkpoint"]], said
    assert status == STOPPED  # none is left: perhaps later, on other nodes


def test_two_runs_on_the_same_nodes_do_not_disturb_each_other(config: Path, tmp_path: Path) -> None:
    spec = {"nodes": ["n1", "n2"], "command": worker(TRAIN)}
    with (
        supervised(tmp_path, tmp_path / "a", config, **spec) as a,
        supervised(tmp_path, tmp_path / "b", config, **spec) as b,
    ):
        a.until_step_of_attempt(1)
        b.until_step_of_attempt(1)
        a.kill_node("n1")
        a.until_step_of_attempt(2)
        finish(a)
        finish(b)
    assert len(a.attempts()) == 2 and len(b.attempts()) == 1
    ports = [seen(run.run, 1, 0)["env"]["MASTER_PORT"] for run in (a, b)]  # type: ignore[index]
    assert ports[0] != ports[1]


def test_strangers_on_the_port_change_nothing(config: Path, tmp_path: Path) -> None:
    with supervised(tmp_path, tmp_path / "run", config, nodes=["n1", "n2"], command=worker(TRAIN)) as run:
        run.until_step_of_attempt(1)
        invitation = read_invitation(run.run)
        assert invitation is not None
        assert (run.run / "launch/supervisor.json").stat().st_mode & 0o077 == 0
        hello = {"verb": "hello", "node": "n1", "job": "1", "nonce": "x", "problems": []}
        sent = [
            b"GET / HTTP/1.1\r\n\r\n",
            b"[" * 100000 + b"\n",
            b"x" * 300000,
            json.dumps(hello | {"proof": invitation.token}).encode() + b"\n",
            json.dumps(hello | {"proof": "\u00e9"}).encode() + b"\n",
            b'{"verb": "end", "attempt": 1}\n',
        ]
        strangers = [socket.create_connection(("127.0.0.1", invitation.port)) for _ in range(80)]
        for stranger, data in zip(strangers, sent, strict=False):
            try:
                stranger.sendall(data)
            except OSError:
                continue
        for stranger in strangers[: len(sent)]:
            stranger.settimeout(10)
            try:
                while stranger.recv(1000):
                    pass
            except ConnectionResetError:
                pass
        time.sleep(1)
        assert len(run.attempts()) == 1 and not run.events("lost")
        run.kill_node("n2")
        for stranger in strangers:
            stranger.close()
        run.bring("n2", job="1")
        finish_after = len(run.attempts())
        run.until(lambda: len(run.attempts()) > finish_after or run.attempts()[-1][0] != "start")
        finish(run)
