"""The names in a run's folder, which people and scripts rely on."""

from __future__ import annotations

from pathlib import Path

from megamoe.core.run_folder import RunFolder


def test_every_path_has_the_name_that_the_readme_gives_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    attempt, launch = run.attempt(2), run.launch
    paths = {
        "config.yaml": run.config,
        "tokenizer.model": run.tokenizer,
        "metrics.jsonl": run.metrics,
        "tensorboard": run.tensorboard,
        "memory.json": run.memory,
        "index": run.index,
        "audit/rank-00003.jsonl": run.audit_of(3),
        "lost/rank-00003.jsonl": run.lost_of(3),
        "eval.json": run.results,
        "eval": run.captions,
        "report.html": run.report,
        "checkpoints/step-00000100": run.checkpoint(100),
        "logs/attempt-2": attempt.path,
        "logs/attempt-2/pids.json": attempt.pids,
        "logs/attempt-2/rank-00003.log": attempt.log(3),
        "logs/attempt-2/rank-00003.end.json": attempt.end(3),
        "launch/config.yaml": launch.config,
        "launch/request.json": launch.request,
        "launch/started": launch.started,
        "launch/jobs": launch.jobs,
        "launch/excluded.json": launch.excluded,
        "launch/job.sh": launch.job_script,
        "launch/helper.sh": launch.helper_script,
        "launch/supervisor.json": launch.supervisor,
        "launch/pulse": launch.pulse,
        "launch/state.json": launch.state,
        "launch/events.jsonl": launch.events,
        "launch/health-n1.log": launch.health_log("n1"),
        "launch/orphaned-abc": launch.orphaned("abc"),
    }
    assert {name: str(path.relative_to(tmp_path)) for name, path in paths.items()} == {name: name for name in paths}


def test_the_newest_attempt_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.latest_attempt() is None
    for name in ("attempt-9", "attempt-10", "attempt-old", "attempt-11.kept"):
        (tmp_path / "logs" / name).mkdir(parents=True)
    latest = run.latest_attempt()
    assert latest is not None and (latest.number, latest.name) == (10, "attempt-10")


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.complete_checkpoints() == {}
    for name in ("step-00000002", ".incomplete-step-00000003", "step-00000004.abandoned", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert run.complete_checkpoints() == {2: run.checkpoint(2)}
