"""A run may stop anywhere and resume with other ranks and workers: the global batches are the same, sample for sample."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamoe.config.data import DataConfig
from megamoe.config.model import VisionConfig
from megamoe.data.loader.step_loader import StepLoader
from megamoe.data.order.position import DataState, earliest
from megamoe.data.order.sample_order import SampleOrder
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import Catalog, DataSet, Source
from megamoe.data.shards.storage import Storage
from tests.data.shard_factory import jpeg, sample, write_tar

LANES, SEED, WINDOW = 24, 11, 2
WEIGHTS = (2.0, 1.0)
STEPS = 14
# what a step holds: for each slot the ids that were trained on and those that were lost
Step = dict[int, tuple[tuple[str, ...], tuple[str, ...]]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """Make two sources of 5 and 3 shards of unequal size; 1% of the pictures are damaged, and one sample has no caption."""
    folder, n, sources = tmp_path_factory.mktemp("elastic"), 0, []
    for source, counts in {"a": [60, 71, 33, 80, 56], "b": [40, 52, 28]}.items():
        shards = []
        for number, count in enumerate(counts):
            members = [m for i in range(n, n + count) for m in sample(i, jpeg(i)[:200] if i % 100 == 50 else None)]
            if source == "b" and number == 1:
                members.insert(40, ("stray.jpg", jpeg(1)))
            shards.append(str(write_tar(folder / source / f"{source}{number}.tar", members)))
            n += count
        sources.append(Source(source, shards, WEIGHTS[len(sources)]))
    return DataSet(sources, folder / "index")


def run(
    data: DataSet, tokenizer: Tokenizer, steps: int, ranks: int, micro: int, workers: int, start: DataState | None = None
) -> tuple[list[Step], DataState]:
    """Return the global batches of all ranks together, and the state after them, as a checkpoint holds it."""
    settings = DataConfig(sequence_length=48, images_per_sequence=3, workers=workers, shuffle_shards=WINDOW)
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(
                StepLoader(
                    settings,
                    vision=VisionConfig(image_size=16, patch_size=8),
                    tokenizer=tokenizer,
                    dataset=data,
                    seed=SEED,
                    global_batch=LANES,
                    micro_batch=micro,
                    dp_rank=rank,
                    dp_size=ranks,
                )
            )
            for rank in range(ranks)
        ]
        for loader in loaders:
            if start is not None:
                loader.go_on_from(start)
        batches: list[Step] = []
        for _ in range(steps):
            batches.append({})
            for step in [next(loader) for loader in loaders]:
                for slot in {slot for slot, _ in step.samples}:
                    used = tuple(name for lane, name in step.samples if lane == slot)
                    batches[-1][slot] = used, tuple(each.id for each in step.lost if each.slot == slot)
            assert sorted(batches[-1]) == list(range(LANES))
        cursors = {lane: cursor for loader in loaders for lane, cursor in loader.state.cursors.items()}
        state = DataState(cursors, earliest(loader.state.anchors for loader in loaders), {})
    return batches, DataState.from_json(json.loads(json.dumps(state.to_json())), "test")


@pytest.fixture(scope="module")
def undisturbed(data: DataSet, tokenizer: Tokenizer) -> tuple[list[Step], DataState]:
    return run(data, tokenizer, STEPS, 1, 24, 0)


def test_each_epoch_of_each_source_is_its_listing_exactly_once(
    data: DataSet, undisturbed: tuple[list[Step], DataState]
) -> None:
    batches, state = undisturbed
    catalog = Catalog(data, Storage())
    order = SampleOrder([5, 3], WEIGHTS, catalog.count, seed=SEED, lanes=LANES, shuffle_shards=WINDOW)
    due: dict[tuple[int, int], list[str]] = {}  # (source, epoch) -> ids, by what the order says of each lane's cursor
    for lane, cursor in state.cursors.items():
        for k in range(cursor):
            ref = order.locate(lane, k)
            due.setdefault((ref.source, ref.epoch), []).append(catalog.sample(*(ref.source, ref.shard, ref.sample)).id)
    seen = Counter(name for step in batches for used, lost in step.values() for name in (*used, *lost))
    assert seen - Counter(name for names in due.values() for name in names) == Counter(
        {"b1.tar#stray": seen["b1.tar#stray"]}
    )
    for source, shards in enumerate((5, 3)):
        listing = [
            catalog.sample(source, shard, n).id for shard in range(shards) for n in range(catalog.count(source, shard))
        ]
        assert len(listing) == (300, 120)[source]
        assert Counter(due[source, 0]) == Counter(listing), "all lanes are past the first epoch"
    lost = Counter(name for step in batches for _, names in step.values() for name in names)
    assert {name.split("#")[1] for name in lost} >= {"00050", "00150", "00250", "00350", "stray"}
    assert not set(lost) & {name for step in batches for used, _ in step.values() for name in used}


@pytest.mark.parametrize(("ranks", "micro", "workers"), [(2, 4, 0), (3, 2, 2), (4, 6, 1), (6, 1, 0), (8, 3, 3), (1, 8, 3)])
def test_a_whole_epoch_is_the_same_on_any_number_of_ranks_and_workers(
    data: DataSet, tokenizer: Tokenizer, undisturbed: tuple[list[Step], DataState], ranks: int, micro: int, workers: int
) -> None:
    batches, state = run(data, tokenizer, STEPS, ranks, micro, workers)
    assert batches == undisturbed[0]
    assert state.cursors == undisturbed[1].cursors


LAYOUTS = st.sampled_from([(r, m) for r in (1, 2, 3, 4, 6, 8) for m in (1, 2, 3, 4) if LANES % (r * m) == 0])


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 5), LAYOUTS), min_size=2, max_size=5))
def test_stopped_anywhere_it_goes_on_under_any_layout(
    data: DataSet, tokenizer: Tokenizer, undisturbed: tuple[list[Step], DataState], parts: list[tuple[int, tuple[int, int]]]
) -> None:
    batches: list[Step] = []
    state = None
    for steps, (ranks, micro) in parts:
        more, state = run(data, tokenizer, min(steps, STEPS - len(batches)), ranks, micro, 0, state)
        batches += more
    assert batches == undisturbed[0][: len(batches)]


def test_held_out_keys_are_never_trained_on_and_all_others_are(data: DataSet, tokenizer: Tokenizer) -> None:
    some = DataSet(data.sources, data.index_dir, held_out=0.3)
    batches, _ = run(some, tokenizer, STEPS, 2, 4, 0)
    seen = {name for step in batches for used, lost in step.values() for name in (*used, *lost)}
    catalogs = Catalog(data, Storage()), Catalog(some, Storage())
    all_ids, kept = (
        {
            c.sample(s, shard, n).id
            for s, many in ((0, 5), (1, 3))
            for shard in range(many)
            for n in range(c.count(s, shard))
        }
        for c in catalogs
    )
    assert kept < all_ids and 0.2 < 1 - len(kept) / len(all_ids) < 0.4
    assert seen - {"b1.tar#stray"} == kept


KILLED = """
import json, sys
from tests.data.test_elastic import *
if __name__ == "__main__":
    out, folder, tokenizer, first, ranks, micro, workers = sys.argv[1:8]
    sources = [Source(n, sorted(map(str, Path(folder, n).glob("*.tar"))), w) for n, w in zip("ab", WEIGHTS)]
    data, tokenizer = DataSet(sources, Path(folder, "index")), Tokenizer(tokenizer)
    state = DataState.from_json(json.loads(first), "test") if first else None
    for _ in range(1000):
        batches, state = run(data, tokenizer, 1, int(ranks), int(micro), int(workers), state)
        with open(out, "a") as file:
            file.write(json.dumps([sorted(batches[0].items()), state.to_json()]) + "\\n")
"""


def test_a_process_killed_at_any_moment_loses_and_repeats_nothing(
    data: DataSet, tokenizer: Tokenizer, tokenizer_path: Path, undisturbed: tuple[list[Step], DataState], tmp_path: Path
) -> None:
    """Each line of the output is a saved checkpoint: the next process resumes from the last complete one."""
    out, script = tmp_path / "steps.jsonl", tmp_path / "run.py"
    script.write_text(KILLED)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    rng, lines = random.Random(4), []
    for ranks, micro, workers in [(2, 4, 2), (3, 2, 0), (1, 8, 1), (8, 1, 0)]:
        state = json.dumps(json.loads(lines[-1])[1]) if lines else ""
        folder = str(Path(data.sources[0].shards[0]).parents[1])
        arguments = [
            sys.executable,
            str(script),
            str(out),
            folder,
            str(tokenizer_path),
            state,
            *map(str, (ranks, micro, workers)),
        ]
        process = subprocess.Popen(arguments, env=env)
        deadline, wanted = time.monotonic() + 60, len(lines) + 2
        while time.monotonic() < deadline and len(whole_lines(out)) < wanted:
            time.sleep(rng.random() / 50)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = whole_lines(out)
        out.write_text("".join(line + "\n" for line in lines))
    assert len(lines) >= 8
    for line, expected in zip(lines, undisturbed[0], strict=False):
        assert [(slot, (tuple(used), tuple(lost))) for slot, (used, lost) in json.loads(line)[0]] == sorted(
            expected.items()
        )


def whole_lines(path: Path) -> list[str]:
    return path.read_text().rsplit("\n", 1)[0].splitlines() if path.exists() and "\n" in path.read_text() else []
