"""map_jobs on a real Dask scheduler with real workers, and as SLURM jobs that a stand-in for sbatch runs."""

from __future__ import annotations

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import data_tools.distribute.dask_cluster
import data_tools.distribute.slurm_workers
from data_tools.distribute.jobs import map_jobs
from megamoe.commands.data.group import data
from megamoe.core.errors import UserError
from tests.data.shard_factory import sample, write_tar
from tests.data_tools import work
from tests.data_tools.build_kit import shard_bytes
from tests.data_tools.image_server import serving

pytest.importorskip("distributed")
pytest.importorskip("dask_jobqueue")
import dask

ROOT = Path(__file__).parents[2]
CONFIG = """\
jobqueue:
  slurm:
    cores: 2
    memory: 1GB
    queue: cpu
    account: vision
    walltime: "02:00:00"
    interface: lo
    log-directory: {logs}
    job-extra-directives: ["--exclusive"]
"""


def start(*command: str, cwd: Path = ROOT) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a scheduler with two workers, each in its own process, and return its address."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    scheduler = start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
    folder = tmp_path_factory.mktemp("dask")
    options = ("--nworkers", "2", "--nthreads", "1", "--no-dashboard", "--local-directory", str(folder))
    workers = start("distributed.cli.dask_worker", address, *options)
    try:
        until = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.1)
        yield address
    finally:
        for process in (workers, scheduler):
            process.terminate()
            process.wait(20)


def test_a_cluster_gives_what_the_pool_gives(cluster: str) -> None:
    found = list(map_jobs(work.square, range(60), label="square", cluster=cluster))
    assert found == list(map_jobs(work.square, range(60), label="square", processes=2))


def test_a_worker_killed_in_the_middle_loses_nothing(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "4").touch()  # this job's worker is killed while it works
    jobs = [(n, tmp_path) for n in range(30)]
    assert [n for _, n in map_jobs(work.die_once, jobs, label="square", cluster=cluster)] == [n * n for n in range(30)]
    assert not list(tmp_path.iterdir())

    results, found, victim = map_jobs(work.square_by, range(150), label="square", cluster=cluster), [], 0
    for n, (squared, pid) in results:
        found.append(squared)
        if n == 20:
            victim = pid
            os.kill(pid, signal.SIGKILL)  # whatever it is doing, and whatever results it still holds
        assert n < 60 or pid != victim
    assert victim and found == [n * n for n in range(150)]


def test_no_more_jobs_are_under_way_than_allowed(cluster: str, tmp_path: Path) -> None:
    jobs = [(n, tmp_path) for n in range(6)]
    for where in ({"cluster": cluster}, {"processes": 2}):
        counts = [count for _, count in map_jobs(work.count_others, jobs, label="count", at_most=1, **where)]
        assert counts == [1] * 6


def test_pictures_are_downloaded_on_a_cluster_within_the_limit_of_a_host(cluster: str, tmp_path: Path) -> None:
    with serving() as server:
        table = tmp_path / "t.csv"
        table.write_text("URL,TEXT\n" + "".join(f"{server.url}/slow/{n}.jpg,about {n}\n" for n in range(24)))
        options = ("--private-hosts", "--shard-size", "4", "--per-host", "3", "--threads", "8")
        for name, where in (("there", ("--cluster", cluster)), ("here", ("--processes", "1"))):
            result = CliRunner().invoke(data, ["build", str(table), str(tmp_path / name), *options, *where])
            assert result.exit_code == 0, result.output
            assert server.busiest <= 3
    assert shard_bytes(tmp_path / "there") == shard_bytes(tmp_path / "here")


def test_a_job_that_kills_every_worker_is_named(cluster: str) -> None:
    with pytest.raises(UserError, match=rf"^number 7: 4 workers of --cluster {cluster} died one after the other"):
        list(map_jobs(work.die_at_7, range(20), label="try", unit="number", cluster=cluster))


def test_an_error_is_raised_here_and_names_its_job(cluster: str) -> None:
    with pytest.raises(ValueError, match="not a number that I like") as caught:
        list(map_jobs(work.fail_at_3, range(9), label="try", unit="number", cluster=cluster))
    assert caught.value.__notes__ == ["This was try, number 3"]


def test_a_result_that_does_not_come_is_given_up_for_now_with_a_stand_in_for_a_future() -> None:
    class Late:
        status = "finished"

        def result(self, timeout: float) -> None:
            raise TimeoutError(timeout)

    with pytest.raises(data_tools.distribute.dask_cluster._NotYetError):
        data_tools.distribute.dask_cluster._result(Late())
    Late.status = "error"  # then it is the job itself that ran out of time
    with pytest.raises(TimeoutError):
        data_tools.distribute.dask_cluster._result(Late())


def test_a_cluster_that_cannot_be_used_is_refused_in_one_line(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_tools.distribute.dask_cluster, "_ANSWER", 1.0)
    nobody = f"tcp://127.0.0.1:{free_port()}"
    for given, processes, message in (
        ("slrum", None, "--cluster slrum: no such cluster; give tcp://HOST:PORT of a running scheduler, or slurm"),
        ("slurm", None, "--cluster slurm: the number of workers is not given; add --processes N (one core each)"),
        (cluster, 2, f"--processes 2: the scheduler {cluster} decides its own workers; omit --processes"),
        (nobody, None, f"--cluster {nobody}: no scheduler answers there; start one with `dask scheduler`, and check"),
    ):
        with pytest.raises(UserError) as caught:
            list(map_jobs(work.square, [1], label="x", cluster=given, processes=processes))
        assert str(caught.value).startswith(message)


def test_workers_without_this_package_are_told_from_a_failing_job(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def double(n):\n    return 2 * n\n")
    monkeypatch.syspath_prepend(tmp_path)
    double = importlib.import_module("only_here").double
    with pytest.raises(UserError, match=f"^--cluster {cluster}: only_here cannot be imported there; install the same"):
        list(map_jobs(double, [1], label="x", cluster=cluster))


def test_a_scheduler_that_goes_away_is_said(tmp_path: Path) -> None:
    port = free_port()
    scheduler = start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
    worker = start("distributed.cli.dask_worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1", "--no-dashboard")
    try:
        _until_it_listens(port)
        with pytest.raises(UserError, match="the scheduler is gone; start it and run the same command again"):
            for n, _ in map_jobs(work.square_by, range(1000), label="square", cluster=f"tcp://127.0.0.1:{port}"):
                if n == 5:
                    scheduler.kill()
    finally:
        scheduler.kill()
        worker.kill()
        scheduler.wait()
        worker.wait()


def _until_it_listens(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the scheduler does not start"
            time.sleep(0.1)


@pytest.mark.parametrize("name", ["distributed", "dask_jobqueue", "cryptography"])
def test_without_the_packages_the_error_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name, *(loaded for loaded in sys.modules if loaded.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs the package {name}.*: pip install distributed dask-jobqueue cryptography"):
        list(map_jobs(work.square, [1], label="x", cluster="slurm", processes=1))


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "cluster.yaml"
    path.write_text(CONFIG.format(logs=tmp_path / "logs"))
    yield path
    dask.config.refresh()


def test_ctrl_c_stays_an_interruption_when_dask_jobqueue_is_there(config: Path) -> None:
    program = f"""
import signal
from pathlib import Path
from data_tools.distribute.slurm_workers import use_config
use_config(Path({str(config)!r}))
signal.raise_signal(signal.SIGINT)"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGINT and ended.stderr.endswith("KeyboardInterrupt\n")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace sbatch, scancel and squeue by scripts that run a batch script as a process group. No SLURM is involved."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    scripts = {
        "sbatch": 'id=$(($(ls *.sh 2>/dev/null | wc -l) + 1)); cp "$1" $id.sh\n'
        "setsid bash $id.sh >/dev/null 2>&1 </dev/null & echo $! >$id.pid; echo Submitted batch job $id",
        "scancel": "kill -- -$(cat $1.pid); echo $1 >>cancelled",
        "squeue": 'for f in *.pid; do kill -0 -- -$(cat $f) 2>/dev/null && echo "${f%.pid}"; done; true',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\ncd {folder}\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return folder


def test_settings_of_slurm_come_from_a_file_and_a_wrong_one_is_named(tmp_path: Path, config: Path) -> None:
    from data_tools.distribute.slurm_workers import use_config

    for text, message in (
        (CONFIG.replace("memory", "memroy"), "jobqueue.slurm.memroy is no setting of dask-jobqueue; nearest: memory"),
        ("slurm: {}", "has no section jobqueue: slurm:"),
        ("a: [", "cannot be read as YAML"),
    ):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(UserError, match=re.escape(message)):
            use_config(tmp_path / "wrong.yaml")
    with pytest.raises(UserError, match="You must specify how much cores and memory"):
        list(map_jobs(work.square, [1], label="x", cluster="slurm", processes=1))
    use_config(config)
    assert dask.config.get("jobqueue.slurm.queue") == "cpu"


def test_slurm_jobs_of_a_stand_in_do_the_work_and_one_that_dies_is_replaced_though_no_slurm_daemon_ran(
    tmp_path: Path, config: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tools.distribute.slurm_workers, "_ASK_EVERY", 1.0)
    data_tools.distribute.slurm_workers.use_config(config)
    found = []
    for n, (squared, _) in map_jobs(work.square_by, range(300), label="square", cluster="slurm", processes=2):
        found.append(squared)
        if n == 20:
            os.killpg(int((stand_in / "1.pid").read_text()), signal.SIGKILL)  # as when a node fails
    assert found == [n * n for n in range(300)]
    script = (stand_in / "1.sh").read_text()
    asked = re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)
    logs = tmp_path / "logs"
    assert asked == [
        "-J dask-worker",
        f"-e {logs}/dask-worker-%J.err",
        f"-o {logs}/dask-worker-%J.out",
        "-p cpu",
        "-A vision",
        "-n 1",
        "--cpus-per-task=2",
        "--mem=954M",
        "-t 02:00:00",
        "--exclusive",
    ]
    assert f"{sys.executable} -m distributed.cli.dask_worker tls://127.0.0.1:" in script
    assert "--nthreads 1" in script and "--nworkers 2" in script and "--interface lo" in script
    assert f"--tls-key {tmp_path}/.dask-jobqueue.worker.key." in script
    assert sorted(path.name for path in stand_in.glob("*.sh")) == ["1.sh", "2.sh"]  # one died, one took its place
    assert "2" in (stand_in / "cancelled").read_text().split()
    assert not list(tmp_path.glob(".dask-jobqueue*"))  # no keys are left


def test_what_sbatch_says_is_told_when_it_refuses_though_no_slurm_daemon_ran(
    tmp_path: Path, config: Path, stand_in: Path
) -> None:
    from data_tools.distribute.slurm_workers import use_config

    use_config(config)
    (stand_in / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid account' >&2; exit 1\n")
    with pytest.raises(
        UserError, match=r"^--cluster slurm: the workers cannot be started: .*sbatch: error: invalid account"
    ):
        list(map_jobs(work.square, [1], label="x", cluster="slurm", processes=1))
    assert not list(tmp_path.glob(".dask-jobqueue*"))


def test_a_job_that_ends_before_its_workers_come_is_named_though_no_slurm_daemon_ran(
    config: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tools.distribute.slurm_workers, "_ASK_EVERY", 0.5)
    data_tools.distribute.slurm_workers.use_config(config)
    with (
        dask.config.set({"jobqueue.slurm.python": "/nowhere/python"}),
        pytest.raises(UserError, match="job 1 ended before"),
    ):
        list(map_jobs(work.square, [1], label="x", cluster="slurm", processes=1))


VERBS = {
    "validate": ["validate", "in", "--json"],
    "checksum": ["checksum", "in", "--json"],
    "stats": ["stats", "in", "--out", "OUT"],
    "filter": ["filter", "in", "OUT", "--min-caption-length", "22"],
    "split": ["split", "in", "OUT", "--names", "train,held-out", "--shares", "0.7,0.3"],
    "dedup": ["dedup", "in", "OUT", "--exact"],
    "reshard": ["reshard", "in", "OUT", "--shard-size", "7", "--shuffle", "--seed", "3"],
    "repair": ["repair", "in", "OUT"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_tool_makes_the_same_on_a_cluster(
    cluster: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, count in enumerate((9, 5, 12)):
        members = [member for n in range(count) for member in sample(20 * number + n)]
        write_tar(tmp_path / f"in/{number:05d}.tar", members)
    monkeypatch.chdir(tmp_path)
    made = []
    for name, options in (("here", ["--processes", "1"]), ("there", ["--cluster", cluster])):
        arguments = [name if word == "OUT" else word for word in VERBS[verb]]
        result = CliRunner().invoke(data, [*arguments, *options])
        assert result.exit_code == 0, result.output
        files = {path.relative_to(name): path.read_bytes() for path in Path(name).rglob("*") if path.is_file()}
        files.pop(Path("stats.html"), None)  # names in its figures count the pages that this process has made
        made.append((files, result.stdout.replace("there", "here")))
    assert made[0] == made[1]
