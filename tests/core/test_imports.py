"""What megamoe/core may import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.training import ROOT


def test_the_ground_floor_needs_nothing_but_the_standard_library() -> None:
    files = {path.stem for path in (ROOT / "megamoe/core").glob("[a-z]*.py")}
    names = sorted(f"megamoe.core.{name}" for name in files - {"packed_batch"})  # its arrays are NumPy's
    code = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=Path(ROOT), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    others = set(json.loads(done.stdout)) - set(sys.stdlib_module_names) - {"megamoe", "__main__"}
    assert not others, f"{others} imported by megamoe/core"
    assert len(names) >= 6
