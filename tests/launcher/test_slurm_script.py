"""The batch scripts: what must stand in them, and that names with blanks and quotes come through unharmed."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from launcher.slurm.batch_script import agents_command, helper_options, helper_script, job_options, job_script
from megamoe.config.schema import Config
from megamoe.core.errors import UserError


def config(slurm: dict[str, Any] | None = None, **launch: Any) -> Config:
    return Config.model_validate({"run": {"name": "tiny"}, "launch": {**launch, "slurm": slurm or {}}})


def script(
    settings: Config, run_dir: Path = Path("/scratch/runs/tiny"), workdir: Path = Path("/home/me"), **more: Any
) -> str:
    return job_script(
        job_options(settings.launch, settings.run.name, run_dir, workdir, **more),
        settings.launch.slurm,
        settings.run.name,
        run_dir,
    )


def directives(text: str) -> list[str]:
    """The options as sbatch reads them: quotes and backslashes mean to it what they mean in a shell's double quotes."""
    return [shlex.split(line.removeprefix("#SBATCH "))[0] for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_the_job_of_a_plain_run() -> None:
    text = script(config(nodes=2))
    assert directives(text) == [
        "--job-name=megamoe-tiny",
        "--chdir=/home/me",
        "--output=/scratch/runs/tiny/logs/job-%j.log",
        "--open-mode=append",
        "--nodes=2",
        "--exclusive",
        "--mem=0",
        "--signal=B:USR1@120",
        "--requeue",
        "--no-kill",
    ]
    assert text.splitlines()[-1] == f"exec {sys.executable} -m megamoe launch supervise /scratch/runs/tiny"


def test_every_option_is_handed_on() -> None:
    asked = {
        "partition": "gpu",
        "account": "vision",
        "qos": "long",
        "constraint": "a100&ib",
        "reservation": "mine",
        "exclude": "n[1-2]",
        "time": "2-00:00:00",
        "memory": "500G",
        "cpus_per_node": 64,
        "signal_seconds": 300,
        "extra": ["--mail-type=FAIL", "--comment=a b"],
    }
    given = directives(script(config(asked, nodes=4, spares=2, gpus_per_node=8), excluded=["n9"]))
    for option in (
        "--partition=gpu",
        "--account=vision",
        "--qos=long",
        "--constraint=a100&ib",
        "--reservation=mine",
        "--exclude=n[1-2],n9",
        "--time=2-00:00:00",
        "--mem=500G",
        "--cpus-per-task=64",
        "--gres=gpu:8",
        "--signal=B:USR1@300",
        "--mail-type=FAIL",
        "--comment=a b",
        "--nodes=4-6",
    ):
        assert option in given
    assert "--exclusive" not in given
    assert not [option for option in given if option.startswith("--ntasks")], "with it a range of nodes is its lower end"


@pytest.mark.parametrize(
    ("again", "option"), [("requeue", "--requeue"), ("chain", "--no-requeue"), ("never", "--no-requeue")]
)
def test_how_it_goes_on(again: str, option: str) -> None:
    given = directives(script(config({"again": again})))
    assert option in given and {"--requeue", "--no-requeue"} & set(given) == {option}


def test_every_choice_has_its_reason() -> None:
    lines = script(config({"partition": "gpu", "time": "60", "exclude": "n1"}, nodes=2, spares=1)).splitlines()
    for number, line in enumerate(lines):
        if line.startswith("#SBATCH") and "job-name" not in line and "chdir" not in line:
            block = lines[:number]
            while block[-1].startswith("#SBATCH"):
                block.pop()
            assert block[-1].startswith("# "), line


@pytest.mark.parametrize(
    "name", ["plain", "with blank", "it's", 'say "hi"', "a # b", "$HOME `id`", "100%", "tab\there", "ünï"]
)
def test_names_come_through_unharmed(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / name
    text = script(config(), run_dir, run_dir)
    given = directives(text)
    assert f"--chdir={run_dir}" in given
    assert f"--output={run_dir}/logs/job-%j.log".replace("100%/", "100%%/") in given
    assert not [line for line in text.splitlines() if line.startswith("#SBATCH") and "\t" in line.split("=")[0]]
    line = text.splitlines()[-1].replace("exec ", 'printf "%s\\n" ', 1)
    said = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    assert said == "\n".join([sys.executable, "-m", "megamoe", "launch", "supervise", str(run_dir)]) + "\n"
    (tmp_path / "job.sh").write_text(text)
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)


@pytest.mark.parametrize("name", ["back\\slash", "line\nbreak"])
def test_a_log_that_slurm_could_not_write_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"(?s)^run\.dir /scratch/.*backslash or a line break"):
        script(config(), Path("/scratch") / name)


def test_a_line_break_in_an_option_does_not_become_a_line_of_the_script() -> None:
    with pytest.raises(UserError, match=r"^--comment: a line break"):
        script(config({"extra": ["--comment=a\nrm -rf /"]}))


def test_setup_comes_before_the_start() -> None:
    lines = script(config({"setup": ["module load cuda", "export A='b c'"]})).splitlines()
    assert lines.index("module load cuda") < lines.index("export A='b c'") < len(lines) - 1


def test_a_helper_job_asks_for_what_the_job_asks_and_spares_its_nodes() -> None:
    settings = config({"partition": "gpu", "exclude": "bad", "time": "10:00:00"}, nodes=4, gpus_per_node=8)
    options = helper_options(
        settings.launch, settings.run.name, Path("/runs/tiny"), Path("/home"), 3, ["n1", "n2"], seconds=5000
    )
    given = directives(helper_script(options, settings.launch.slurm, settings.run.name, Path("/runs/tiny")))
    for option in ("--partition=gpu", "--exclude=bad,n1,n2", "--nodes=1-3", "--gres=gpu:8", "--exclusive", "--no-requeue"):
        assert option in given
    assert "--time=84" in given, "no longer than the job that it helps, which the partition may not allow"
    endless = helper_options(
        settings.launch, settings.run.name, Path("/runs/tiny"), Path("/home"), 1, [], seconds=float("inf")
    )
    assert not [option for _, group in endless for option in group if option.startswith("--time")]


def test_agents_outlive_each_other() -> None:
    command = agents_command(config().launch.slurm, Path("/runs/tiny"), ["n1", "n3"])
    assert command[0] == "srun" and command[-5:] == [sys.executable, "-m", "megamoe", "launch", "agent", "/runs/tiny"][-5:]
    for option in ("--overlap", "--no-kill", "--kill-on-bad-exit=0", "--nodes=2", "--ntasks=2", "--nodelist=n1,n3"):
        assert option in command


def test_a_container_sees_the_run_and_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = config({"container": "nvcr.io#megamoe:1", "container_mounts": ["/data:/data"]})
    command = agents_command(settings.launch.slurm, Path("/runs/tiny"))
    assert "--container-image=nvcr.io#megamoe:1" in command
    assert f"--container-mounts=/runs/tiny:/runs/tiny,{tmp_path}:{tmp_path},/data:/data" in command
    assert "python3" in command and sys.executable not in command


@pytest.mark.parametrize("verb", ["supervise", "agent"])
def test_a_warning_before_anybody_listens_neither_ends_the_job_nor_is_lost(verb: str) -> None:
    lines = script(config()).splitlines()
    shell = lines[lines.index("trap '' USR1") : -1]
    starting = f"""
        import os, signal
        import launcher.slurm.inside_job
        from launcher.workers.stop_signals import caught_signals
        from megamoe.commands.launch import launch

        def listen_late(*_):
            os.kill(os.getpid(), signal.SIGUSR1)
            with caught_signals() as caught:
                print(*caught.received)
            return 0

        launcher.slurm.inside_job.supervise_run = launcher.slurm.inside_job.serve_run = listen_late
        launch(["{verb}", "/runs/tiny"])
    """
    command = shlex.join([sys.executable, "-c", textwrap.dedent(starting)])
    job = subprocess.run(
        ["bash", "-c", "\n".join([*shell, "kill -USR1 $$", f"exec {command}"])], capture_output=True, text=True
    )
    assert (job.returncode, job.stdout, job.stderr) == (0, f"{signal.SIGUSR1.value}\n", "")
