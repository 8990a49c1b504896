"""Real training over nodes: what the supervisor does to it leaves no trace in losses and order of samples."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from launcher.elastic.events import recoveries
from tests.launcher.local_cluster import supervised
from tests.training import audit, largest_difference, make_data, metrics, small_config, train, write_config


@pytest.mark.nightly  # tests/slurm/test_ladder.py shows the same on real nodes
def test_a_run_that_shrinks_and_grows_again_is_the_undisturbed_one(tmp_path: Path) -> None:
    make_data(tmp_path)
    config = write_config(
        tmp_path,
        small_config(
            parallel={"pipeline": 3},
            train={"steps": 12, "global_batch": 12},
            checkpoint={"every": 2, "keep": 100},
            launch={"nodes": 3, "max_restarts": 3, "node_timeout": 30.0},
        ),
    )
    undisturbed = train(tmp_path, "undisturbed", 1, ["parallel.pipeline=1"])
    with supervised(tmp_path, tmp_path / "runs/disturbed", config, nodes=["n1", "n2", "n3"]) as run:
        run.until((run.run / "checkpoints/step-00000002").exists)
        run.kill_node("n2")
        run.until_step_of_attempt(2)
        rank = run.rank(1)
        os.kill(rank, signal.SIGSTOP)  # so that steps are left when the node is there again
        run.bring("n2")
        run.until(lambda: json.loads((run.run / "launch/state.json").read_text())["phase"] == "stopping")
        os.kill(rank, signal.SIGCONT)
        status, said = run.end()
    assert status == 0, said
    assert run.attempts() == [
        ("start", ["n1", "n2", "n3"]),
        ("shrink", ["n1", "n3"]),
        ("grow", ["n1", "n2", "n3"]),
    ], said
    layouts = [event["detail"]["layout"] for event in run.events("attempt")]
    assert [layout[:20] for layout in layouts] == ["3 ranks = pipeline 3", "2 ranks = pipeline 2", "3 ranks = pipeline 3"]
    assert [each.kind for each in recoveries(run.run)] == ["shrink", "grow"]
    difference, where = largest_difference(undisturbed, metrics(run.run))
    assert difference < 1e-5, where
    assert audit(run.run) == audit(tmp_path / "runs/undisturbed")
