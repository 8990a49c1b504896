"""What is carried to a machine with a GPU and no network: all that training imports there, and nothing made for another."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.training import small_config, write_config

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu"
MIB = 2**20
# The machine has torch, and with it what torch requires.
THERE = {"torch", "torchgen", "functorch", "triton", "numpy", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"} | {
    "setuptools", "_distutils_hack", "pkg_resources"
}  # fmt: skip
FOR_THERE = re.compile(r"-(py3|py2\.py3)-none-any\.whl$|-(cp312-cp312|cp\d+-abi3)-[\w.]*manylinux[\w.]*_x86_64\.whl$")
ONLY_THESE = """
import os, sys
from importlib.machinery import PathFinder
allowed = {*os.environ["ALLOWED"].split(), *sys.stdlib_module_names}
find = PathFinder.find_spec
def find_these(name, path=None, target=None):
    known = name.partition(".")[0] in allowed or name.startswith("_sysconfigdata")  # this one is of the standard library
    return find(name, path, target) if known else None
PathFinder.find_spec = find_these
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    lines = (GPU / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_each_package_of_the_pack_has_its_version_in_the_constraints() -> None:
    pinned = {normal(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert requirements() and {normal(name) for name in requirements()} <= pinned


def run(folder: Path, *arguments: str, python: str) -> subprocess.CompletedProcess[str]:
    """Run run.sh of a checkout that has nothing else, but maybe a pack."""
    scripts = folder / "checkout" / "benchmarks" / "gpu"
    scripts.mkdir(parents=True, exist_ok=True)
    shutil.copy(GPU / "run.sh", scripts)
    if " " in python:  # a script in its place
        (folder / "python").write_text(f"#!/bin/sh\n{python}\n")
        (folder / "python").chmod(0o755)
        python = str(folder / "python")
    env = os.environ | {"PYTHON": python, "MEGAMOE_GPU_SITE": "site"}
    return subprocess.run([scripts / "run.sh", *arguments], cwd=folder, env=env, capture_output=True, text=True)


def fake_pack(folder: Path) -> Path:
    """A pack of one wheel, which has a package "benchmarks" as fairscale has, and of one empty shard."""
    pack = folder / "checkout" / "benchmarks" / "gpu" / ".pack"
    (pack / "wheels").mkdir(parents=True)
    (pack / "recipe").write_text("made")
    with zipfile.ZipFile(pack / "wheels" / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "")
        wheel.writestr("benchmarks/__init__.py", "")
    (pack / "data" / "train").mkdir(parents=True)
    (pack / "data" / "train" / "00000.tar").touch()
    return pack


@pytest.mark.parametrize(
    ("packed", "arguments", "python", "said"),
    [
        (False, [], "", "give the folder for the results"),
        (False, ["out"], "", "there is no .*/benchmarks/gpu/.pack; make it by benchmarks/gpu/pack.sh"),
        (True, ["out"], "none-such", "none-such does not run"),
        (True, ["out"], "echo 3.10", "the pack is for Python 3.12, and .*python is 3.10"),
        (True, ["out"], "case $2 in *torch*) echo 'No torch' >&2; exit 1;; esac; echo 3.12", "import torch: No torch"),
    ],
)
def test_run_refuses_in_one_line(packed: bool, arguments: list[str], python: str, said: str, tmp_path: Path) -> None:
    if packed:
        fake_pack(tmp_path)
    done = run(tmp_path, *arguments, python=python)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"run\.sh: .*{said}.*\n", done.stderr)


def test_run_finds_the_repository_before_the_wheels_and_torch_where_it_was(tmp_path: Path) -> None:
    pack = fake_pack(tmp_path)
    (pack.parents[1] / "__init__.py").touch()
    (pack.parent / "__main__.py").write_text(
        "import sys, benchmarks, carried, torch\n"
        "print(benchmarks.__file__, carried.__file__, torch.__file__, *sys.argv[1:], sep='\\n')\n"
    )
    done = run(tmp_path, "out", "--tiny", python=f'[ "$1" = -c ] && [ -z "$3" ] && echo 3.12 || exec {sys.executable} "$@"')
    assert done.stdout.splitlines() == [
        f"{tmp_path}/checkout/benchmarks/__init__.py", f"{tmp_path}/site/carried.py", torch.__file__,
        "--out", f"{tmp_path}/out", "--data", f"{pack}/data", "--tiny",
    ], done.stderr  # fmt: skip
    # A copy may be newer than its original, and an index that is older than its shard is refused.
    assert (pack / "data" / "train" / "00000.tar").stat().st_mtime == 0


def test_pack_replaces_nothing_that_is_no_pack(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run([GPU / "pack.sh", tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and (tmp_path / "data").exists()
    assert done.stderr == f"pack.sh: {tmp_path} holds something else; name a new folder\n"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack, made as a user makes it: from the package index."""
    folder = tmp_path_factory.mktemp("pack")
    subprocess.run([GPU / "pack.sh", folder], env=os.environ | {"PYTHON": sys.executable}, check=True)
    return folder


@pytest.mark.nightly
def test_pack_is_small_and_all_of_it_runs_on_that_machine(pack: Path) -> None:
    wheels = sorted((pack / "wheels").iterdir())
    assert sum(path.stat().st_size for path in pack.rglob("*") if path.is_file()) < 60 * MIB
    assert [wheel.name for wheel in wheels if not FOR_THERE.search(wheel.name)] == []
    assert sorted(normal(wheel.name.partition("-")[0]) for wheel in wheels) == sorted(map(normal, requirements()))
    for wheel in wheels:
        names = zipfile.ZipFile(wheel).namelist()
        compiled = [name for name in names if re.search(r"\.(so|o|a)\b", name)]
        assert not compiled or not wheel.name.endswith("-any.whl"), f"{wheel.name}: {compiled}"
        # run.sh unzips: what an installation would put elsewhere must not be needed.
        assert [name for name in names if ".data/" in name and ".data/scripts/" not in name] == []


@pytest.mark.nightly
def test_second_time_does_nothing(pack: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pack.rglob("*")}
    done = subprocess.run([GPU / "pack.sh", pack], env=os.environ | {"PYTHON": sys.executable}, capture_output=True)
    assert done.returncode == 0 and {path: path.stat().st_mtime_ns for path in pack.rglob("*")} == before


@pytest.mark.nightly
def test_commands_import_nothing_but_the_pack_and_torch(pack: Path, tmp_path: Path) -> None:
    """On the Python of the tests, which does not find anything else."""
    allowed = THERE | {"benchmarks", "data_tools", "launcher", "megamoe", "sitecustomize"}
    for wheel in (pack / "wheels").iterdir():
        tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
        allowed |= {top.partition(".")[0] for top in tops if not re.search(r"\.(dist-info|data|libs)$", top)}
    (tmp_path / "sitecustomize.py").write_text(ONLY_THESE)
    commands(sys.executable, pack, tmp_path, {"PYTHONPATH": f"{tmp_path}:{ROOT}", "ALLOWED": " ".join(allowed)})


@pytest.mark.nightly
def test_commands_run_on_python_312_with_the_pack_unzipped(pack: Path, tmp_path: Path) -> None:
    python = shutil.which("python3.12")
    if python is None or subprocess.run([python, "-c", "import torch, numpy"], capture_output=True).returncode:
        pytest.skip("no python3.12 with torch and numpy in PATH")
    for wheel in (pack / "wheels").iterdir():
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    commands(python, pack, tmp_path, {"PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}"})


def commands(python: str, pack: Path, folder: Path, environment: dict[str, str]) -> None:
    """Train on one rank and on two, caption a picture, caption the held-out ones, check the checkpoint, index shards."""
    data = {"train": f"{pack}/data/train", "validation": f"{pack}/data/validation"}
    write_config(folder, small_config(data=data | {"tokenizer": f"{pack}/data/tokenizer.model"}, train={"steps": 2}))
    shards = shutil.copytree(pack / "data" / "validation", folder / "shards")
    subprocess.run(["tar", "-xf", shards / "00000.tar", "000000000.jpg"], cwd=folder, check=True)
    for arguments in (
        "train config.yaml --nproc 1 run.name=one parallel.recompute=offload",
        "train config.yaml --nproc 2 run.name=two parallel.pipeline=2 data.workers=1",
        "generate runs/one 000000000.jpg",
        "eval runs/two --limit 2",
        "checkpoint verify runs/two",
        "data index shards --force",
    ):
        command = [python, "-m", "megamoe", *arguments.split()]
        env = os.environ | environment | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, errors="replace")
        logs = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("runs/*/logs/*/*")))
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}{logs}"
