"""What a trial may have left behind: processes, shared memory, half-written files."""

from __future__ import annotations

from benchmarks.chaos.training import Training


def leftovers(training: Training) -> list[str]:
    """All that is left of a training that has ended, one line each."""
    left = training.all_gone()
    if training.shared_memory is not None:
        left += [f"/dev/shm/{path.name}" for path in sorted(training.shared_memory.iterdir())]
    run = training.run
    named = training.said.read_text(errors="replace")
    for path in sorted((run / "checkpoints").iterdir()):
        # Set aside on purpose, and said so: of steps that were damaged, or not gone on from.
        aside = path.name.startswith(".abandoned-") and f"{path.name}: set aside" in named
        if not path.name.startswith("step-") and path.name != ".ballast" and not aside:
            left.append(str(path))
    for path in sorted(run.rglob("*")):
        if path.is_file() and (".tmp" in path.name or path.name.startswith(".config.yaml.")):
            left.append(str(path))
    return left
