"""What a node is looked at for: with this machine's own numbers, and with made-up ones for each thing that may be wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.health.gpus import GIB, visible_gpus
from launcher.health.node import (
    Readings,
    _group_memory,
    clock_difference,
    clock_problem,
    free_memory,
    node_problems,
    real_readings,
    room_problem,
)
from megamoe.config.launch import LaunchConfig
from megamoe.config.schema import Config
from megamoe.model.size import model_size

GPU = {
    "gpu": "0, GPU-aa, 4, 0\n1, GPU-bb, 4, [N/A]\n",
    "remapped-rows": "GPU-aa, 0, 0\nGPU-bb, No, No\n",
    "compute-apps": "",
}


def limits(gpus: int = 0, **health: object) -> LaunchConfig:
    return LaunchConfig.model_validate({"gpus_per_node": gpus, "health": health})


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up nvidia-smi in the PATH, which answers with the files of its folder; two sound GPUs."""
    folder = tmp_path / "smi"
    folder.mkdir()
    for query, rows in GPU.items():
        (folder / query).write_text(rows)
    program = folder / "nvidia-smi"
    program.write_text('#!/bin/sh\nname=${1#--query-}\nexec cat "$(dirname "$0")/${name%%=*}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def lines(run: Path, limits: LaunchConfig, readings: Readings | None = None) -> list[str]:
    return [str(problem) for problem in node_problems("n7", run, limits, readings)]


def test_this_machine_is_sound_by_its_real_readings(tmp_path: Path) -> None:
    assert lines(tmp_path, limits()) == []
    assert 0.1 * GIB < free_memory() < 1 << 50
    took = time.perf_counter()
    lines(tmp_path, limits())
    assert time.perf_counter() - took < 3  # before each attempt


def test_real_readings_below_a_limit_are_told_with_what_to_do(tmp_path: Path) -> None:
    memory, shared, temporary = lines(tmp_path, limits(free_memory=1e6, free_shared=1e6, free_temporary=1e6))
    assert memory.startswith("n7: free memory: ") and "at least 1e+06 GiB (launch.health.free_memory); end what" in memory
    assert shared.startswith("n7: free space in /dev/shm: ") and "launch.health.free_shared" in shared
    assert temporary.startswith("n7: free space in /") and "launch.health.free_temporary" in temporary
    assert lines(tmp_path, limits(check="off", free_memory=1e6)) == []
    assert lines(tmp_path, limits(free_memory=0, free_shared=0, free_temporary=0)) == []


def test_made_up_free_memory_counts_for_each_rank(tmp_path: Path) -> None:
    readings = replace(real_readings(), memory=lambda: int(3.5 * GIB))
    config = limits(free_memory=1.0).model_copy(update={"ranks_per_node": 4})
    assert lines(tmp_path, config, readings) == [
        "n7: free memory: 3.50 GiB, at least 4 GiB (launch.health.free_memory); end what uses it, or take other nodes"
    ]


def test_a_run_folder_that_is_not_there_or_cannot_be_written_is_told(tmp_path: Path) -> None:
    (line,) = lines(tmp_path / "elsewhere", limits())
    assert "cannot be written (No such file or directory)" in line and "mount it there" in line
    (line,) = lines(Path("/proc"), limits())
    assert line.startswith("n7: run.dir /proc: cannot be written")


def test_a_run_folder_without_room_for_a_checkpoint_is_the_run_s_problem_and_no_node_s(tmp_path: Path) -> None:
    config = Config.model_validate({"run": {"dir": str(tmp_path)}})
    assert room_problem(config) is None
    made_up = replace(real_readings(), space=lambda folder: GIB // 2)
    line = room_problem(config, made_up)
    assert line is not None and "0.50 GiB free, a checkpoint needs " in line and str(tmp_path) in line
    sgd = config.model_copy(update={"optim": config.optim.model_copy(update={"name": "sgd"})})
    three = replace(real_readings(), space=lambda folder: model_size(config).parameters * 5)
    assert room_problem(sgd, three) is None and room_problem(config, three) is not None


def test_a_made_up_memory_limit_of_a_job_counts_without_the_page_cache(tmp_path: Path) -> None:
    for version, group, names in (
        ("0::/job/step", tmp_path / "two/job", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:memory:/job/step",
            tmp_path / "one/memory/job",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ):
        (group / "step").mkdir(parents=True)
        (group / names[0]).write_text("8000\n")
        (group / names[1]).write_text("7000\n")
        (group / "memory.stat").write_text(f"anon 1\n{names[2]} 500\n")
        (group / "step" / names[0]).write_text("max\n")
        root = group.parent.parent if "memory" in version else group.parent
        assert _group_memory(f"3:cpu:/\n{version}\n", root) == [1500]


def test_made_up_gpus_that_are_sound_are_no_problem(tmp_path: Path, smi: Path) -> None:
    assert lines(tmp_path, limits(gpus=2)) == []
    assert [gpu.errors for gpu in visible_gpus()] == [0, None]


@pytest.mark.parametrize(
    ("query", "rows", "said"),
    [
        ("gpu", "0, GPU-aa, 4, 0\n", "n7: GPUs visible: 1, 2 wanted (launch.gpus_per_node); ask the job for as many"),
        (
            "gpu",
            "0, GPU-aa, 4, 3\n1, GPU-bb, 4, 0\n",
            "n7: GPU 0 uncorrected memory errors: 3, 0 allowed; reset or replace",
        ),
        ("gpu", "Unable to determine the device handle\n", "n7: GPUs: nvidia-smi says what is not understood"),
        ("remapped-rows", "GPU-bb, 0, 1\n", "n7: GPU 1 memory: a faulty row could not be remapped, none allowed; reset"),
        ("remapped-rows", "GPU-bb, Yes, No\n", "n7: GPU 1 memory: a faulty row waits to be remapped"),
    ],
)
def test_made_up_gpus_that_are_bad_are_named(tmp_path: Path, smi: Path, query: str, rows: str, said: str) -> None:
    (smi / query).write_text(rows)
    (line,) = lines(tmp_path, limits(gpus=2))
    assert line.startswith(said)


def test_a_made_up_gpu_in_use_is_named_with_who_uses_it(tmp_path: Path, smi: Path) -> None:
    (smi / "gpu").write_text("0, GPU-aa, 4, 0\n1, GPU-bb, 20480, 0\n")
    (smi / "compute-apps").write_text("GPU-bb, 4711, /opt/bin/python\n")
    assert lines(tmp_path, limits(gpus=2)) == [
        "n7: GPU 1 memory in use: 20.0 GiB by python (4711), at most 1 GiB (launch.health.gpu_used); end what uses it"
    ]


def test_made_up_gpus_outside_cuda_visible_devices_do_not_count(
    tmp_path: Path, smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (smi / "gpu").write_text("0, GPU-aa, 90000, 0\n1, GPU-bb, 4, 0\n")
    for chosen in ("1", "GPU-bb"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert lines(tmp_path, limits(gpus=1)) == []
        assert "GPUs visible: 1, 2 wanted" in lines(tmp_path, limits(gpus=2))[0]


def test_a_made_up_nvidia_smi_that_fails_or_is_not_there_is_told(tmp_path: Path, smi: Path) -> None:
    (smi / "nvidia-smi").write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    (line,) = lines(tmp_path, limits(gpus=2))
    assert line.startswith("n7: GPUs: nvidia-smi fails with status 6: No devices were found, 2 wanted")

    def nothing(what: str, fields: Sequence[str]) -> list[list[str]]:
        raise FileNotFoundError(2, "No such file or directory")

    (line,) = lines(tmp_path, limits(gpus=2), replace(real_readings(), gpus=nothing))
    assert line.startswith("n7: GPUs: no nvidia-smi")


def test_a_slow_answer_is_no_wrong_clock_and_a_wrong_clock_is_told() -> None:
    assert clock_difference(100.0, sent=90.0, received=130.0) == 0
    assert clock_difference(80.0, sent=90.0, received=91.0) == -10
    assert clock_difference(99.0, sent=90.0, received=91.0) == 8
    assert clock_problem("n7", 0.5, limits()) is None and clock_problem("n7", -10, limits(clock=0)) is None
    assert str(clock_problem("n7", -10, limits())) == (
        "n7: clock: 10.0 s behind the supervisor's, at most 5 s (launch.health.clock); start its time service (chrony)"
    )
