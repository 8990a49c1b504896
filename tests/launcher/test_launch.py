"""megamoe launch without SLURM: what is refused before submission, what is written, what people read.

Stand-ins on the PATH say what SLURM 22.05 says. The real one is in tests/slurm.
"""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.slurm.follow_log import show_log
from launcher.slurm.request import Request, exclude_node, first_start, note_job, noted_jobs
from launcher.slurm.submission import options_as_settings
from megamoe.cli import main
from megamoe.config import load_config
from tests.test_cli import CONFIG

PARTITIONS = """\
PartitionName=main Default=YES QoS=N/A MaxNodes=UNLIMITED MaxTime=UNLIMITED Nodes=n[1-4] State=UP TotalNodes=4
PartitionName=short Default=NO QoS=N/A MaxNodes=2 MaxTime=02:00:00 Nodes=n[1-4] State=UP TotalNodes=4
"""
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a config, and no SLURM on the PATH."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/sbin-of-nobody")
    return tmp_path


@pytest.fixture
def slurm(folder: Path) -> Path:
    """Stand-ins for SLURM's commands; each notes how it was called in calls.log, with stdin in NAME.stdin."""
    stand_in(folder, "scontrol", PARTITIONS)
    stand_in(folder, "sbatch", "4711\n")
    stand_in(folder, "squeue", "")
    stand_in(folder, "scancel", "")
    return folder


def stand_in(folder: Path, name: str, answer: str, *, said: str = "", status: int = 0) -> None:
    (folder / f"{name}.out").write_text(answer)
    (folder / f"{name}.err").write_text(said)
    tool = folder / "bin" / name
    tool.write_text(
        f'#!/bin/bash\necho "{name} $*" >> {folder}/calls.log\n/bin/cat {folder}/{name}.out\n'
        f"/bin/cat {folder}/{name}.err >&2\nexit {status}\n"
    )
    tool.chmod(0o755)


def calls(folder: Path) -> list[str]:
    log = folder / "calls.log"
    return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Iterator[Say]:
    """Run the command; exit status, stdout and stderr."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["launch", *arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    yield run
    # Verbs that run inside a job block SIGUSR1, which processes that later tests start would inherit.
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def names(folder: Path) -> list[str]:
    ours = ("tiny.yaml", "bin", "calls.log")
    return sorted(path.name for path in folder.iterdir() if path.name not in ours and path.suffix not in (".out", ".err"))


def test_a_dry_run_prints_the_script_and_writes_nothing(folder: Path, say: Say) -> None:
    status, out, err = say("slurm", "tiny.yaml", "--nodes", "2", "--time", "24:00:00", "--dry-run")
    assert status == 0 and out.startswith("#!/bin/bash\n") and "#SBATCH --time=24:00:00\n" in out
    assert err == "no sbatch here: partition, account, number of nodes and time were not checked\n"
    assert names(folder) == []


def test_a_dry_run_asks_slurm_where_it_can(slurm: Path, say: Say) -> None:
    assert say("slurm", "tiny.yaml", "--nodes", "2", "--dry-run")[0] == 0
    assert "sbatch --test-only" in calls(slurm) and "sbatch --parsable" not in "\n".join(calls(slurm))
    assert names(slurm) == []


def test_a_submission_is_written_down_and_says_how_to_follow_it(slurm: Path, say: Say) -> None:
    status, out, _ = say("slurm", "tiny.yaml", "--nodes", "2", "--account", "007", "train.steps=20")
    run = slurm / "runs/tiny"
    assert status == 0
    assert out.splitlines() == [
        f"submitted job 4711; the run is in {run}",
        "  how it goes   megamoe launch status runs/tiny",
        "  what it says  megamoe launch logs --follow runs/tiny",
        "  save and end  megamoe launch stop runs/tiny",
    ]
    assert calls(slurm)[-1] == f"sbatch --parsable {run}/launch/job.sh"
    assert "#SBATCH --account=007\n" in (run / "launch/job.sh").read_text()
    assert (run / "logs").is_dir(), "SLURM does not make the folder of its log"
    request = Request.read(run)
    assert (request.resume, request.workdir) == ("none", slurm)
    settings = load_config(request.config, request.overrides)
    assert (settings.launch.nodes, settings.launch.slurm.account, settings.train.steps) == (2, "007", 20)
    assert request.config != slurm / "tiny.yaml", "a later change of the config must not change the run"
    assert noted_jobs(run) == {"4711": "run"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nodes", "3"], "train.global_batch 4 is not a multiple"),
        (["--nodes", "16", "--min-nodes", "13", "train.global_batch=16"], "launch.min_nodes 13: no layout fits 13 nodes"),
        (["--nodes", "2", "--min-nodes", "4"], "launch.min_nodes 4 is more than launch.nodes 2"),
        (["launch.stop_grace=200"], "launch.slurm.signal_seconds 120: the run needs up to launch.stop_grace 200 s"),
        (["--time", "3"], "launch.slurm.time 3: the run is told to save"),
        (["--time", "tomorrow"], "launch.slurm.time tomorrow: no time of SLURM"),
        (["launch.slurm.extra=[mail]"], "launch.slurm.extra 'mail': no option of sbatch"),
        (["launch.slurm.partitoin=x"], "unknown key launch.slurm.partitoin; did you mean launch.slurm.partition?"),
        (["--resume", "no/step-00000010"], "--resume no/step-00000010: no such checkpoint"),
        (["--partition", "gpu"], "launch.slurm.partition gpu: there is no such partition; this cluster has main, short"),
        (["--nodes", "4", "--spares", "1"], "launch.nodes 4 + launch.spares 1: partition main gives a job 4 nodes at most"),
        (["--nodes", "4", "--partition", "short"], "launch.nodes 4: partition short gives a job 2 nodes at most"),
        (
            ["--partition", "short", "--time", "3:00:00"],
            "launch.slurm.time 3:00:00: the limit of partition short is 02:00:00",
        ),
    ],
)
def test_what_is_wrong_is_one_line_before_submission(arguments: list[str], line: str, slurm: Path, say: Say) -> None:
    status, out, err = say("slurm", "tiny.yaml", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert line in err
    assert names(slurm) == [], "nothing was written"
    assert not [call for call in calls(slurm) if call.startswith("sbatch --parsable")]


def test_without_slurm_it_says_so(folder: Path, say: Say) -> None:
    status, _, err = say("slurm", "tiny.yaml")
    assert status == 2 and err.startswith("megamoe: error: sbatch: not found; run this on a login node")


def test_slurms_own_words_are_passed_on(slurm: Path, say: Say) -> None:
    stand_in(slurm, "sbatch", "", said="sbatch: error: Batch job submission failed: Invalid qos specification\n", status=1)
    status, _, err = say("slurm", "tiny.yaml", "--qos", "gold")
    assert status == 2
    assert "SLURM would not take the job: sbatch: Batch job submission failed: Invalid qos specification" in err


def test_the_accounts_of_the_user_are_named_where_the_site_keeps_them(slurm: Path, say: Say) -> None:
    stand_in(slurm, "sacctmgr", "vision\nlanguage\n")
    assert "cannot charge it; your accounts: language, vision" in say("slurm", "tiny.yaml", "--account", "gold")[2]
    stand_in(slurm, "sacctmgr", "", said="You are not running a supported accounting_storage plugin\n", status=1)
    assert say("slurm", "tiny.yaml", "--account", "gold")[0] == 0


def test_a_controller_that_is_silent_is_said(slurm: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.slurm.tools.TIMEOUT", 0.2)
    (slurm / "bin/scontrol").write_text("#!/bin/bash\nexec /bin/sleep 5\n")
    assert "scontrol: SLURM has not answered" in say("slurm", "tiny.yaml")[2]


def test_the_folder_of_a_run_is_refused_with_the_verb_that_goes_on(slurm: Path, say: Say) -> None:
    (slurm / "runs/tiny").mkdir(parents=True)
    (slurm / "runs/tiny/metrics.jsonl").write_text('{"step": 1}\n')
    status, _, err = say("slurm", "tiny.yaml")
    assert status == 2 and "holds a run already; go on with it by `megamoe launch resume runs/tiny`" in err


def test_a_run_that_is_in_the_queue_is_not_submitted_twice(slurm: Path, say: Say) -> None:
    say("slurm", "tiny.yaml")
    stand_in(slurm, "squeue", "4711|RUNNING|n[1-2]|1:00|UNLIMITED|None|megamoe-tiny\n")
    for arguments in (["slurm", "tiny.yaml"], ["resume", "runs/tiny"]):
        status, _, err = say(*arguments)
        assert status == 2 and "job 4711 of this run is in the queue" in err


def test_resume_asks_for_what_was_asked_with_the_new_on_top(slurm: Path, say: Say) -> None:
    say("slurm", "tiny.yaml", "--nodes", "2", "--partition", "main", "train.steps=20")
    (slurm / "tiny.yaml").write_text("broken: [")
    exclude_node(slurm / "runs/tiny", "n3", "its GPU is gone")
    assert first_start(slurm / "runs/tiny") and not first_start(slurm / "runs/tiny")
    assert say("resume", "runs/tiny", "--nodes", "4", "train.steps=30")[0] == 0
    request = Request.read(slurm / "runs/tiny")
    assert request.resume == "auto"
    assert request.overrides == ("launch.slurm.partition=main", "train.steps=30", "launch.nodes=4")
    text = (slurm / "runs/tiny/launch/job.sh").read_text()
    assert "#SBATCH --nodes=4\n" in text and "#SBATCH --exclude=n3\n" in text
    assert first_start(slurm / "runs/tiny"), "of this request"


def test_resume_cannot_rename_the_run(slurm: Path, say: Say) -> None:
    say("slurm", "tiny.yaml")
    status, _, err = say("resume", "runs/tiny", "run.name=other")
    assert status == 2 and "leave run.name and run.dir as they are" in err


def test_stop_takes_what_waits_first_and_lets_the_run_save(slurm: Path, say: Say) -> None:
    say("slurm", "tiny.yaml")
    note_job(slurm / "runs/tiny", "4712", "next")
    note_job(slurm / "runs/tiny", "4713", "helper")
    rows = ("4711|RUNNING|n[1-2]|1:00|1:00:00|None|megamoe-tiny", "4712|PENDING||0:00|1:00:00|Dependency|megamoe-tiny")
    stand_in(slurm, "squeue", "\n".join([*rows, "4713|PENDING||0:00|1:00:00|Resources|megamoe-tiny-helper", ""]))
    status, out, _ = say("stop", "runs/tiny")
    assert status == 0 and "go on with it later by `megamoe launch resume runs/tiny`" in out
    assert [call for call in calls(slurm) if call.startswith("scancel")] == [
        "scancel 4712",
        "scancel 4713",
        "scancel --batch --signal=TERM 4711",
    ]
    say("stop", "--now", "runs/tiny")
    assert calls(slurm)[-1] == "scancel 4711"


def test_stop_of_a_run_without_job_says_so(slurm: Path, say: Say) -> None:
    say("slurm", "tiny.yaml")
    assert say("stop", "runs/tiny")[:2] == (0, "runs/tiny: no job of this run is in the queue\n")


@pytest.mark.parametrize("verb", ["status", "stop", "resume", "supervise"])
def test_what_was_never_launched_is_said(verb: str, slurm: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    status, _, err = say(verb, "runs/nothing")
    assert status == 2 and "runs/nothing: no launched run" in err


def test_status_shows_job_nodes_and_events(slurm: Path, say: Say) -> None:
    say("slurm", "tiny.yaml", "--nodes", "2")
    run = slurm / "runs/tiny"
    assert "job        none of this run is in the queue" in say("status", "runs/tiny")[1]
    stand_in(slurm, "squeue", "4711|PENDING||0:00|1:00:00|Priority|megamoe-tiny\n")
    assert "job        4711, waits (Priority)" in say("status", "runs/tiny")[1]

    stand_in(slurm, "squeue", "4711|RUNNING|n[1-2]|1:00|1:00:00|None|megamoe-tiny\n")
    nodes = [{"name": "n1", "address": "10.0.0.1", "state": "working", "job": "4711", "since": 1.8e9}]
    state = {"job": "4711", "phase": "training", "attempt": 2, "layout": "2 ranks", "nodes": nodes, "since": 1.8e9}
    (run / "launch/state.json").write_text(json.dumps(state))
    events = [{"time": 1.8e9, "event": "lost", "node": "n2", "step": None, "detail": {"why": "no sign of life"}}]
    (run / "launch/events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"time": 1')
    (run / "metrics.jsonl").write_text('{"step": 7}\n')
    exclude_node(run, "n3", "its GPU is gone")
    out = say("status", "runs/tiny")[1]
    for part in ("running on n[1-2] for 1:00 of 1:00:00", "7 of 10, saved up to 0", "attempt 2", "n3: its GPU is gone"):
        assert part in out
    assert "10.0.0.1  working  4711" in out and "lost   n2    -     why no sign of life" in out
    found = json.loads(say("status", "runs/tiny", "--json")[1])
    assert found["jobs"]["4711"]["state"] == "RUNNING" and found["events"] == events and found["supervisor"] == state

    stand_in(slurm, "squeue", "", said="squeue: error: Unable to contact slurm controller\n", status=1)
    assert "job        unknown: squeue: Unable to contact slurm controller" in say("status", "runs/tiny")[1]


def test_logs_show_the_end_of_the_newest(slurm: Path, say: Say) -> None:
    logs = slurm / "runs/tiny/logs"
    (logs / "attempt-1").mkdir(parents=True)
    (logs / "attempt-2").mkdir()
    assert "there is no log yet" in say("logs", "runs/tiny")[2]
    for job in (1, 2):
        (logs / f"job-{job}.log").write_text("".join(f"{job}:{line}\n" for line in range(100)))
        os.utime(logs / f"job-{job}.log", (job, job))
        (logs / f"attempt-{job}/rank-00003.log").write_text(f"attempt {job}\n")
    assert say("logs", "runs/tiny", "--lines", "2")[1] == "2:98\n2:99\n"
    assert say("logs", "runs/tiny", "--rank", "3")[1] == "attempt 2\n"
    assert "has logs of ranks 3 to 3" in say("logs", "runs/tiny", "--rank", "4")[2]
    assert "runs/nothing: no such run" in say("logs", "runs/nothing")[2]


def test_following_a_log_goes_over_to_its_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.slurm.follow_log.LOOK_EVERY", 0)
    first, second, shown = tmp_path / "first", tmp_path / "second", io.BytesIO()

    def found() -> Iterator[Path | None]:
        yield None  # the job waits
        first.write_text("a\nb\n")
        yield first
        with first.open("a") as file:
            file.write("c\n")
        yield first
        second.write_text("d\n")
        yield second
        raise KeyboardInterrupt

    looks = found()
    with pytest.raises(KeyboardInterrupt):
        show_log(lambda: next(looks), 1, True, shown)
    assert shown.getvalue().decode() == f"b\nc\n==> {second} <==\nd\n"


def test_an_option_is_the_setting_of_its_name(folder: Path) -> None:
    given = {
        "nodes": 4,
        "min_nodes": 2,
        "spares": 1,
        "gpus_per_node": 8,
        "ranks_per_node": 2,
        "partition": "a,b",
        "account": "0123",
        "time": "24:00:00",
        "qos": "yes",
        "constraint": "[a&b]",
        "exclude": "n[1-3]",
        "reservation": "null",
        "container": "docker://x#y:1",
    }
    launch = load_config("tiny.yaml", options_as_settings(given)).launch
    found = launch.model_dump() | launch.slurm.model_dump()
    assert {name: found[name] for name in given} == given
    assert options_as_settings({"qos": None, "nodes": None}) == []
