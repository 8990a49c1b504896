"""Only megamoe/parallel/deepspeed knows DeepSpeed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.training import ROOT

FOLDER = ROOT / "megamoe" / "parallel" / "deepspeed"
PACKAGES = ("megamoe", "launcher", "data_tools", "benchmarks")


def uses_of_deepspeed(source: str) -> list[int]:
    """Lines that import ``deepspeed``, or reach into the engine by an attribute ``.deepspeed``."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        names: list[str | None] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names = [each.value for each in node.args if isinstance(each, ast.Constant)]
        elif isinstance(node, ast.Attribute) and node.attr == "deepspeed":
            names = ["deepspeed"]
        if any(name is not None and name.split(".")[0] == "deepspeed" for name in names):
            lines.append(node.lineno)
    return sorted(lines)


@pytest.mark.parametrize(
    "source",
    [
        "import deepspeed",
        "import torch, deepspeed.pipe as pipe",
        "def late():\n    from deepspeed.runtime.pipe import schedule",
        "importlib.import_module('deepspeed.ops')",
        "engine.deepspeed.optimizer.step()",
    ],
)
def test_every_kind_of_use_is_found(source: str) -> None:
    assert uses_of_deepspeed(source)


def test_names_of_the_folder_and_of_the_package_in_texts_are_no_use() -> None:
    assert not uses_of_deepspeed("from megamoe.parallel.deepspeed.engine import TrainEngine\nversion('deepspeed')")


def test_nothing_outside_the_folder_uses_deepspeed() -> None:
    assert any(uses_of_deepspeed(path.read_text()) for path in FOLDER.glob("*.py"))
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if not _hidden(path)]
    assert len(files) > 200
    found = {str(path.relative_to(ROOT)): uses_of_deepspeed(path.read_text()) for path in files if path.parent != FOLDER}
    assert not {path: lines for path, lines in found.items() if lines}


def _hidden(path: Path) -> bool:
    """Whether a path lies in a folder that benchmarks fill, such as environments of peers."""
    return any(part.startswith(".") for part in path.relative_to(ROOT).parts)
