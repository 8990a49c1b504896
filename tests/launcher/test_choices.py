"""The supervisor's rules, without processes: layouts, nodes, losses, history."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.elastic.events import History, Recovery, recoveries
from launcher.elastic.layouts import choose_layout, layout_overrides, team_sizes
from launcher.elastic.node_choice import Losses, natural
from launcher.elastic.starts import how_it_begins, in_vain
from launcher.workers.run_progress import RunState
from megamoe.config import Config
from megamoe.config.launch import LaunchConfig
from megamoe.core.errors import UserError
from megamoe.core.run_folder import RunFolder
from tests.training import small_config


def config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate(small_config(**sections))


@pytest.mark.parametrize(
    ("pipeline", "expert", "ranks", "found"),
    [
        (2, 2, 4, (2, 2, 2)),  # the config's own
        (2, 2, 2, (2, 1, 1)),  # either factor may go; both leave as much to hold, and the first stays
        (2, 2, 3, (3, 1, 1)),  # 8 sequences have no third
        (1, 4, 2, (1, 2, 2)),
        (4, 1, 2, (2, 1, 1)),
        (1, 1, 7, (7, 1, 1)),
    ],
)
def test_the_layout_nearest_to_the_configs_is_chosen(
    pipeline: int, expert: int, ranks: int, found: tuple[int, int, int]
) -> None:
    layout = choose_layout(config(parallel={"pipeline": pipeline, "expert": expert}), ranks)
    assert layout is not None and (layout.pipeline, layout.data, layout.expert) == found
    assert layout.accumulation * layout.data == 8
    assert layout_overrides(layout) == [f"parallel.pipeline={found[0]}", f"parallel.expert={found[2]}"]


def test_numbers_of_nodes_without_a_layout_are_left_out_or_refused() -> None:
    zero = {"zero": 2}
    assert team_sizes(config(parallel=zero, launch={"nodes": 5})) == [1, 2, 4]
    assert team_sizes(config(parallel=zero, launch={"nodes": 5, "min_nodes": 2, "ranks_per_node": 2})) == [2, 4]
    with pytest.raises(UserError, match=r"no layout fits 5 to 7 nodes .* divide train.global_batch .* \(8\)"):
        team_sizes(config(parallel=zero, launch={"nodes": 7, "min_nodes": 5}))
    with pytest.raises(UserError, match=r"launch\.min_nodes 3 is more than launch.nodes 2"):
        team_sizes(config(launch={"nodes": 2, "min_nodes": 3}))


def test_nodes_are_numbered_as_people_count() -> None:
    assert sorted(["n10", "n9", "n1", "rack2-n1", "rack10-n1"], key=natural) == ["n1", "n9", "n10", "rack2-n1", "rack10-n1"]


def test_losses_have_an_end_unless_the_run_comes_further() -> None:
    losses = Losses(LaunchConfig(nodes=2, max_restarts=1)).after(["a"], RunState(5, 0, None))
    assert not losses.too_often("a")
    losses = losses.after(["a"], RunState(9, 0, None))
    assert losses.too_often("a") and not losses.too_often("b")  # twice, and no checkpoint
    losses = losses.after(["b"], RunState(12, 10, Path("step-10")))
    assert not losses.too_often("b") and not losses.too_often("a")
    losses = losses.after(["b"], RunState(22, 20, Path("step-20")))
    assert not losses.too_often("b")
    for _ in range(2):
        losses = losses.after(["c"], RunState(22, 20, None))
        assert losses.stuck() is None
    assert losses.after(["d"], RunState(22, 20, None)).stuck() is not None


def write(run: Path, *events: tuple[float, str, int | None, dict[str, object]]) -> None:
    (run / "launch").mkdir(exist_ok=True)
    with RunFolder(run).launch.events.open("a") as file:
        for at, event, step, detail in events:
            file.write(json.dumps({"time": at, "event": event, "node": None, "step": step, "detail": detail}) + "\n")


def test_the_time_of_a_recovery_is_from_the_notice_to_the_first_step(tmp_path: Path) -> None:
    write(
        tmp_path,
        (10, "attempt", None, {"kind": "start", "since": 9}),
        (20, "step", 1, {}),
        (31, "attempt", None, {"kind": "rank", "since": 30}),
        (38, "step", 5, {}),
        (41, "attempt", None, {"kind": "spare", "since": 40}),
        (43, "attempt", None, {"kind": "shrink", "since": 42}),
        (50, "step", 6, {}),
    )
    assert recoveries(tmp_path) == [Recovery("rank", 8, 5), Recovery("shrink", 8, 6)]


def test_what_the_cluster_took_of_a_recovery_is_known(tmp_path: Path) -> None:
    write(
        tmp_path,
        (10, "supervisor", None, {"job": "7", "started": 8}),
        (11, "attempt", None, {"kind": "start", "since": 10}),
        (20, "step", 1, {}),
        (30, "stop", None, {}),
        (32, "finished", None, {}),
        (55, "supervisor", None, {"job": "7", "started": 52}),
        (56, "attempt", None, {"kind": "again", "since": 30}),
        (60, "step", 2, {}),
        (70, "attempt", None, {"kind": "rank", "since": 69}),
        (75, "step", 3, {}),
    )
    assert recoveries(tmp_path) == [Recovery("again", 30, 2, waited=20), Recovery("rank", 6, 3)]


def test_a_run_knows_why_it_is_started(tmp_path: Path) -> None:
    def started(at: float) -> tuple[float, str, int | None, dict[str, object]]:
        return (at, "supervisor", None, {"job": "7"})

    assert how_it_begins(tmp_path, "7")[0] == "start"
    write(tmp_path, started(9), (11, "again", None, {"accepted": True, "saved": 0}), (12, "finished", None, {}))
    assert how_it_begins(tmp_path, "7") == ("again", 11)
    write(tmp_path, started(13), (20, "attempt", None, {"kind": "again", "since": 11}), (21, "finished", None, {}))
    assert how_it_begins(tmp_path, "7")[0] == "start"  # by a person
    write(tmp_path, started(22), (25, "stop", None, {"signal": "SIGTERM"}), (26, "finished", None, {}))
    assert how_it_begins(tmp_path, "7") == ("again", 25), "SLURM has requeued the job"
    assert how_it_begins(tmp_path, "8")[0] == "start"  # a job that a person has submitted after he had stopped that one
    write(tmp_path, started(29), (30, "attempt", None, {"kind": "start", "since": 30}), (60, "orphaned", None, {}))
    assert how_it_begins(tmp_path, "7") == ("host", 30)
    (tmp_path / "launch/pulse").write_text("44.5\n")
    assert how_it_begins(tmp_path, "7") == ("host", 44.5)


def test_a_run_is_not_started_again_for_ever(tmp_path: Path) -> None:
    write(tmp_path, *[(at, "again", None, {"accepted": True, "saved": 5}) for at in (1, 2)])
    assert in_vain(tmp_path, 5, limit=3) is None and in_vain(tmp_path, 6, limit=1) is None
    write(tmp_path, (3, "again", None, {"accepted": True, "saved": 5}))
    assert (
        in_vain(tmp_path, 5, limit=3) == "no progress: started again 3 times in a row with no checkpoint later than step 5"
    )


def test_a_cut_line_of_the_history_is_left_out(tmp_path: Path) -> None:
    before = time.time()
    History(tmp_path).event("supervisor", job="7")
    with RunFolder(tmp_path).launch.events.open("a") as file:
        file.write('{"time": 1, "ev')
    assert recoveries(tmp_path) == []
    assert how_it_begins(tmp_path, "7")[1] >= before
