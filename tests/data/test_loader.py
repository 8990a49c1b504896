"""The loader: the same global batches on every layout, from every stop, with every number of workers."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megamoe.config.data import DataConfig
from megamoe.config.model import VisionConfig
from megamoe.core.errors import DataError, UserError
from megamoe.core.packed_batch import PackedBatch
from megamoe.data.loader import lane as lane_module
from megamoe.data.loader.processes import WorkerDied
from megamoe.data.loader.step_loader import StepBatch, StepLoader, _InWorkers
from megamoe.data.order.position import DataState, earliest
from megamoe.data.order.sample_order import Anchor, SampleOrder
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import BadShard, Catalog, DataSet
from megamoe.data.shards.storage import Storage
from tests.data.shard_factory import jpeg, make_set

VISION = VisionConfig(image_size=16, patch_size=8)
GLOBAL_BATCH = 8
SPOILT = {3: b"", 11: b"<html>", 29: jpeg(29)[:300], 30: jpeg(30)[:-40]}
# what one slot of one step is: pixels, text, the ids that went in, those that were lost, and the state after it
Slot = tuple[bytes, bytes, tuple[str, ...], tuple[tuple[str, str], ...], int]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_set(tmp_path_factory.mktemp("shards"), [13, 21, 7], SPOILT)


def loader(shards: DataSet, tokenizer: Tokenizer, dp_rank: int, dp_size: int, micro: int, workers: int) -> StepLoader:
    data = DataConfig(sequence_length=48, images_per_sequence=3, workers=workers, shuffle_shards=2)
    return StepLoader(
        data,
        vision=VISION,
        tokenizer=tokenizer,
        dataset=shards,
        seed=5,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


def slots_of(step: StepBatch, cursors: Mapping[int, int], dp_rank: int, dp_size: int, micro: int) -> dict[int, Slot]:
    """Return the slots by number, from the documented rule of which micro-batch holds which lanes."""
    found: dict[int, Slot] = {}
    for i, (pixels, text) in enumerate(step.micro_batches):
        assert pixels.shape == (micro, 3, 16, 16, 3) and pixels.dtype == torch.uint8
        assert text.shape == (micro, 3, 48) and text.dtype == torch.int64
        for b in range(micro):
            slot = (i * dp_size + dp_rank) * micro + b
            ids = tuple(name for number, name in step.samples if number == slot)
            lost = tuple((each.id, each.reason) for each in step.lost if each.slot == slot)
            found[slot] = (pixels[b].numpy().tobytes(), text[b].numpy().tobytes(), ids, lost, cursors[slot])
    assert step.targets == sum(PackedBatch.of(text).targets for _, text in step.micro_batches)
    assert step.wait_seconds >= 0
    return found


def run(
    shards: DataSet,
    tokenizer: Tokenizer,
    steps: int,
    dp_size: int = 1,
    micro: int = 1,
    workers: int = 0,
    start: DataState | None = None,
) -> tuple[list[dict[int, Slot]], DataState]:
    """Return the global batches of ``steps`` steps and the state after them, all ranks together."""
    with ExitStack() as stack:
        ranks = [stack.enter_context(loader(shards, tokenizer, d, dp_size, micro, workers)) for d in range(dp_size)]
        for rank in ranks:
            if start is not None:
                rank.go_on_from(start)
        batches = []
        for _ in range(steps):
            batch: dict[int, Slot] = {}
            for d, rank in enumerate(ranks):
                batch |= slots_of(next(rank), rank.state.cursors, d, dp_size, micro)
            assert sorted(batch) == list(range(GLOBAL_BATCH))
            batches.append(batch)
        cursors = {lane: rank.state.cursors[lane] for rank in ranks for lane in rank.state.cursors}
        anchors = earliest(rank.state.anchors for rank in ranks)
    return batches, DataState({lane: cursors[lane] for lane in sorted(cursors)}, anchors, {})


@pytest.fixture(scope="module")
def reference(shards: DataSet, tokenizer: Tokenizer) -> tuple[list[dict[int, Slot]], DataState]:
    return run(shards, tokenizer, 12)


@pytest.mark.parametrize(
    ("dp_size", "micro", "workers"), [(1, 8, 0), (2, 2, 0), (4, 2, 0), (8, 1, 0), (2, 4, 1), (1, 2, 3), (4, 1, 9)]
)
def test_global_batches_are_the_same_on_every_layout(
    shards: DataSet,
    tokenizer: Tokenizer,
    reference: tuple[list[dict[int, Slot]], DataState],
    dp_size: int,
    micro: int,
    workers: int,
) -> None:
    batches, state = run(shards, tokenizer, 12, dp_size, micro, workers)
    assert batches == reference[0] and state.cursors == reference[1].cursors


def test_a_stopped_run_goes_on_exactly_on_other_ranks(
    shards: DataSet, tokenizer: Tokenizer, reference: tuple[list[dict[int, Slot]], DataState]
) -> None:
    first, state = run(shards, tokenizer, 4, dp_size=4, micro=2, workers=0)
    second, state = run(shards, tokenizer, 3, dp_size=2, micro=1, workers=2, start=state)
    third, state = run(shards, tokenizer, 5, dp_size=1, micro=4, workers=0, start=state)
    assert first + second + third == reference[0] and state.cursors == reference[1].cursors


def test_every_sample_comes_once_per_epoch_and_corrupt_ones_are_lost_once(shards: DataSet, tokenizer: Tokenizer) -> None:
    batches, state = run(shards, tokenizer, 14, dp_size=2, micro=2)
    catalog = Catalog(shards, Storage())
    counts = [catalog.count(0, shard) for shard in range(3)]
    epochs = min(state.cursors.values()) * GLOBAL_BATCH // sum(counts)
    assert epochs >= 3
    order = SampleOrder([3], [1.0], lambda _, shard: counts[shard], seed=5, lanes=GLOBAL_BATCH, shuffle_shards=2)
    everything = {catalog.sample(0, shard, n).id for shard, count in enumerate(counts) for n in range(count)}
    spoilt = {name for name in everything if int(name.split("#")[1]) in SPOILT}
    times_seen: Counter[str] = Counter()
    for lane, cursor in state.cursors.items():
        used = [name for batch in batches for name in batch[lane][2]]
        lost = [name for batch in batches for name, _ in batch[lane][3]]
        assert set(lost) <= spoilt and not set(used) & spoilt
        due = [order.locate(lane, k) for k in range(cursor)]
        assert Counter(used + lost) == Counter(catalog.sample(0, ref.shard, ref.sample).id for ref in due)
        times_seen.update(catalog.sample(0, ref.shard, ref.sample).id for ref in due if ref.epoch < epochs)
    assert times_seen == Counter({name: epochs for name in everything})


def test_corrupt_samples_are_named_with_the_reason(shards: DataSet, tokenizer: Tokenizer) -> None:
    with loader(shards, tokenizer, 0, 1, 8, 0) as one:
        lost = {each.id: each.reason for _ in range(6) for each in next(one).lost}
    assert lost["00000.tar#00003"] == "image: empty"
    assert lost["00000.tar#00011"].startswith("image: not a JPEG, PNG or WebP")
    assert len(lost) == 4


def test_prefetched_steps_do_not_count_as_seen(shards: DataSet, tokenizer: Tokenizer) -> None:
    with loader(shards, tokenizer, 0, 1, 8, 2) as one:
        next(one)
        first = one.state
        next(one)
        second = one.state
        assert second != first
        one.go_on_from(first)
        assert one.state == first
        next(one)
        assert one.state == second


def test_captions_that_do_not_fit_are_cut_and_counted(shards: DataSet, tokenizer: Tokenizer) -> None:
    data = DataConfig(sequence_length=8, images_per_sequence=3, workers=0)
    with StepLoader(
        data,
        vision=VISION,
        tokenizer=tokenizer,
        dataset=shards,
        seed=0,
        global_batch=2,
        micro_batch=2,
        dp_rank=0,
        dp_size=1,
    ) as one:
        step = next(one)
    assert step.truncated == 2 and step.targets == 2 * 4
    assert (step.micro_batches[0][1][:, 0, -1] == tokenizer.eos_id).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_random_numbers_of_the_training_process_are_left_alone(shards: DataSet, tokenizer: Tokenizer, workers: int) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before, expected = torch.get_rng_state(), np.random.RandomState(0).random(4)
    with loader(shards, tokenizer, 0, 1, 8, workers) as one:
        next(one)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.random(4), expected)


def test_a_batch_that_does_not_divide_is_refused(shards: DataSet, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"train.global_batch 8: not a multiple of train.micro_batch 1 x 3"):
        loader(shards, tokenizer, 0, 3, 1, 0)


def test_the_state_of_another_global_batch_is_refused(shards: DataSet, tokenizer: Tokenizer) -> None:
    state = DataState({lane: 0 for lane in range(4)}, (Anchor(0, 0),), {})
    with pytest.raises(DataError, match=r"holds 4 lanes, but train.global_batch is 8"):
        loader(shards, tokenizer, 0, 1, 1, 0).go_on_from(state)


def test_data_of_which_nothing_can_be_used_stops_the_run(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "MAX_LOST_IN_A_ROW", 50)
    spoilt = make_set(tmp_path, [5], {n: b"" for n in range(5)})
    with pytest.raises(DataError, match=r"image: empty; 50 samples in a row cannot be used"):
        next(loader(spoilt, tokenizer, 0, 1, 8, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_goes_bad_is_the_same_one_line_with_and_without_workers(
    tmp_path: Path, tokenizer: Tokenizer, workers: int
) -> None:
    shards = make_set(tmp_path, [40])
    os.truncate(shards.sources[0].shards[0], 5000)
    with pytest.raises(DataError) as raised, loader(shards, tokenizer, 0, 1, 8, workers) as one:
        next(one)
    assert isinstance(raised.value, BadShard) and "is older than its shard" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_dead_worker_is_named(shards: DataSet, tokenizer: Tokenizer) -> None:
    with loader(shards, tokenizer, 0, 1, 8, 2) as one:
        next(one)
        victim = workers_of(one)[1]
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=rf"data worker 1 \(pid {victim}\) was killed by SIGKILL"):
            for _ in range(50):
                next(one)


def test_workers_end_when_closed_and_ignore_signals_meant_for_the_run(shards: DataSet, tokenizer: Tokenizer) -> None:
    one = loader(shards, tokenizer, 0, 1, 8, 2)
    next(one)
    workers = workers_of(one)
    for worker in [*workers, psutil.Process(workers[0]).ppid()]:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, number)
    for _ in range(4):
        next(one)
    one.close()
    one.close()
    assert not any(psutil.pid_exists(worker) for worker in workers)


def test_workers_do_without_torch_and_share_what_they_import(shards: DataSet, tokenizer: Tokenizer) -> None:
    with loader(shards, tokenizer, 0, 1, 8, 2) as one:
        next(one)
        for worker in workers_of(one):
            process = psutil.Process(worker)
            assert not any("libtorch" in each.path for each in process.memory_maps())
            assert process.memory_full_info().uss < 32e6


def test_a_worker_keeps_the_memory_that_scaling_a_picture_takes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = make_set(tmp_path, [12], {number: jpeg(number, 500) for number in range(12)})
    data = DataConfig(sequence_length=440, images_per_sequence=2, workers=1, shuffle_shards=1)
    vision = VisionConfig(image_size=224, patch_size=16)
    rank = {"seed": 0, "global_batch": 4, "micro_batch": 4, "dp_rank": 0, "dp_size": 1}
    with StepLoader(data, vision=vision, tokenizer=tokenizer, dataset=shards, **rank) as one:
        for _ in range(10):  # by then all buffers have been written
            next(one)
        before = page_faults(*workers_of(one))
        pictures = sum(len(next(one).samples) for _ in range(20))
        assert page_faults(*workers_of(one)) - before < 10 * pictures  # 250 KB of pixels are 61 pages


def page_faults(process: int) -> int:
    """Return the minor page faults of a process so far; see proc_pid_stat(5)."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[7])


def test_a_micro_batch_of_several_workers_is_not_copied(shards: DataSet, tokenizer: Tokenizer) -> None:
    with loader(shards, tokenizer, 0, 1, 8, 3) as one:
        steps = [next(one) for _ in range(12)]  # all kept: copies would each have a place of their own
        places = [pixels.data_ptr() for step in steps for pixels, _ in step.micro_batches]
    assert len(places) == 12 and len(set(places)) == one._prefetch + 3


def test_an_error_in_a_worker_comes_with_its_traceback(shards: DataSet, tokenizer: Tokenizer) -> None:
    with loader(shards, tokenizer, 0, 1, 8, 1) as one:
        one._state = DataState({lane: -1 for lane in range(8)}, (Anchor(0, 0),), {})
        with pytest.raises(WorkerDied, match=r"(?s)data worker 0 failed:.*a lane never goes back"):
            next(one)


def test_a_worker_that_is_stopped_is_ended_all_the_same(shards: DataSet, tokenizer: Tokenizer) -> None:
    one = loader(shards, tokenizer, 0, 1, 8, 2)
    next(one)
    stopped, other = workers_of(one)
    os.kill(stopped, signal.SIGSTOP)
    one.close()
    until = time.monotonic() + 10
    while psutil.pid_exists(stopped) or psutil.pid_exists(other):
        assert time.monotonic() < until
        time.sleep(0.05)


def workers_of(one: StepLoader) -> list[int]:
    assert isinstance(one._running, _InWorkers)
    return one._running.pids


def test_with_fewer_open_files_than_shards_in_use_the_batches_are_the_same(
    shards: DataSet,
    tokenizer: Tokenizer,
    reference: tuple[list[dict[int, Slot]], DataState],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits, opened = [], []
    read = Storage.read

    def watched(storage: Storage, *arguments: Any) -> list[memoryview]:
        found = read(storage, *arguments)
        limits.append(storage.limit)
        opened.append(len(storage._open))
        return found

    monkeypatch.setattr(Storage, "read", watched)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 4))
    batches, state = run(shards, tokenizer, 12)
    assert batches == reference[0] and state.cursors == reference[1].cursors
    assert set(limits) == {1} and set(opened) == {1}


@pytest.mark.parametrize(
    ("in_use", "files", "kept"), [(0, 20_000, 128), (500, 20_000, 500), (500, 1024, 256), (9000, -1, 9000)]
)
def test_as_many_shards_are_open_as_are_in_use_within_the_limit_of_files(
    shards: DataSet, monkeypatch: pytest.MonkeyPatch, in_use: int, files: int, kept: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    storage = Storage()
    Catalog(shards, storage).keep(in_use)
    assert storage.limit == kept


SCRIPT = """
import os, signal, sys
from pathlib import Path
from megamoe.config.data import DataConfig
from megamoe.config.model import VisionConfig
from megamoe.data.shards.catalog import DataSet, Source
from megamoe.data.loader.step_loader import StepLoader
from megamoe.data.sample.tokenizer import Tokenizer
if __name__ == "__main__":
    shards = DataSet([Source("0", sys.argv[3:])])
    data = DataConfig(sequence_length=48, images_per_sequence=3, workers=2)
    loader = StepLoader(data, vision=VisionConfig(image_size=16, patch_size=8), tokenizer=Tokenizer(sys.argv[2]),
                        dataset=shards, seed=0, global_batch=4, micro_batch=1, dp_rank=0, dp_size=1)
    next(loader)
    assert "deepspeed" not in sys.modules
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit("as after an error")
"""


@pytest.mark.parametrize(("end", "status"), [("error", 1), ("killed", -signal.SIGKILL)])
def test_workers_end_with_a_run_that_does_not_close_them(
    shards: DataSet, tokenizer_path: Path, tmp_path: Path, end: str, status: int
) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    arguments = [sys.executable, str(script), end, str(tokenizer_path), *shards.sources[0].shards]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    # the pipe of stderr is open as long as any worker lives, so this returns only when all have ended
    done = subprocess.run(arguments, env=env, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert end == "killed" or done.stderr.strip().endswith("as after an error"), done.stderr
