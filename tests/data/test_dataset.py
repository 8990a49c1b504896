"""Shards as a data set of PyTorch and webdataset: the same samples, once, in an order that no layout changes."""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from hypothesis import HealthCheck, settings
from hypothesis import given as example
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from megamoe.core.errors import DataError, UserError
from megamoe.data import BadShard, CorruptSample, ShardDataset
from megamoe.data.library.dataset_position import Share
from megamoe.data.shards.index import learn_index
from tests.data.shard_factory import caption, jpeg, sample, write_tar

COUNTS = (17, 30, 9, 22, 30, 12)  # 120 samples
KEYS = [f"{n:05d}" for n in range(sum(COUNTS))]


@pytest.fixture(autouse=True)
def a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, n = tmp_path_factory.mktemp("shards"), 0
    for number, count in enumerate(COUNTS):
        members = [m for i in range(n, n + count) for m in [*sample(i), (f"{i:05d}.json", json.dumps({"n": i}).encode())]]
        write_tar(folder / f"{number:05d}.tar", members)
        n += count
    return folder


def make(shards: Path | str, **settings: Any) -> ShardDataset:
    return ShardDataset(shards, **{"global_batch": 12, "seed": 5, "shuffle_shards": 2, **settings})


def keys(samples: Any) -> list[str]:
    return [each["__key__"] for each in samples]


def batches(dataset: ShardDataset, size: int | None = None) -> Any:
    """Make a pipeline that yields lists of keys."""
    return dataset.map(lambda each: each["__key__"]).batched(size or dataset.micro_batch, collation_fn=list)


# --- webdataset


def test_it_is_the_first_stage_of_a_webdataset_pipeline(shards: Path) -> None:
    pipeline = wds.DataPipeline(
        make(shards, epochs=1),
        wds.decode("pil"),
        wds.rename(image="jpg;png", text="txt"),
        wds.to_tuple("image", "text", "__key__"),
        wds.batched(64, collation_fn=list),
    )
    given = list(pipeline)
    assert [len(batch) for batch in given] == [64, 56]
    for image, text, key in (each for batch in given for each in batch):
        assert image.size == (32, 32) and image.mode == "RGB"
        assert text == caption(int(key))


def test_webdatasets_methods_give_the_same_pipeline(shards: Path) -> None:
    fluid = make(shards, epochs=1).decode("pil").rename(image="jpg;png").to_tuple("image", "__key__").batched(64)
    assert [list(key) for _, key in fluid] == [
        keys(part) for part in (list(make(shards, epochs=1))[:64], list(make(shards, epochs=1))[64:])
    ]


def test_handlers_of_later_stages_work_as_ever(shards: Path, tmp_path: Path) -> None:
    spoilt = write_tar(tmp_path / "bad.tar", [*sample(0), *sample(1, b"no picture"), *sample(2)])
    dataset = make(spoilt, epochs=1, global_batch=1)
    assert sorted(keys(dataset.decode("pil", handler=wds.ignore_and_continue))) == ["00000", "00002"]
    with pytest.raises(wds.DecodingError):
        list(make(spoilt, epochs=1, global_batch=1).decode("pil"))


def test_samples_are_those_that_webdataset_reads(shards: Path) -> None:
    names = sorted(map(str, shards.glob("*.tar")))
    theirs = {
        each["__key__"]: {k: v for k, v in each.items() if k != "__local_path__"}
        for each in wds.WebDataset(names, shardshuffle=False)
    }
    ours = list(make(shards, epochs=1))
    assert {each["__key__"]: each for each in ours} == theirs
    assert len(ours) == len(theirs) == 120 and keys(ours) != sorted(keys(ours))


def test_web_loader_workers_and_batches_outside_give_the_same_order(shards: Path) -> None:
    alone = keys(make(shards, epochs=1))
    single = make(shards, epochs=1, micro_batch=1).map(lambda each: each["__key__"])
    outside = wds.WebLoader(single, batch_size=None, num_workers=3).batched(10, collation_fn=list)
    assert list(outside) == list(grouped(alone, 10))


# --- exactly once, on any layout


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 3), (3, 0), (4, 1)])
def test_each_epoch_is_every_sample_once_over_ranks_and_workers(shards: Path, ranks: int, workers: int) -> None:
    epochs: list[list[str]] = [[], []]
    for rank in range(ranks):
        pipeline = batches(make(shards, epochs=1, rank=rank, world_size=ranks))
        loader = DataLoader(pipeline, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
        for epoch in epochs:
            epoch += [key for batch in loader for key in batch]
    assert sorted(epochs[0]) == sorted(epochs[1]) == KEYS
    assert epochs[0] != epochs[1], "each epoch has an order of its own"


def test_several_epochs_in_one_pass_are_each_sample_that_often(shards: Path) -> None:
    given = [key for rank in range(3) for key in keys(make(shards, epochs=2, rank=rank, world_size=3))]
    assert Counter(given) == dict.fromkeys(KEYS, 2)


@pytest.mark.parametrize(("ranks", "workers", "micro"), [(2, 0, None), (3, 2, None), (2, 2, 3), (6, 1, 1), (1, 3, 2)])
def test_each_step_has_the_same_samples_on_any_layout(shards: Path, ranks: int, workers: int, micro: int | None) -> None:
    steps = [set(part) for part in grouped(keys(islice(make(shards), 12 * 25)), 12)]
    given: list[set[str]] = [set() for _ in steps]
    for rank in range(ranks):
        dataset = make(shards, rank=rank, world_size=ranks, micro_batch=micro)
        loader = iter(DataLoader(batches(dataset), batch_size=None, num_workers=workers))
        for step in given:
            for _ in range(12 // ranks // dataset.micro_batch):
                step.update(next(loader))
    assert given == steps


def grouped(given: list[str], size: int) -> Iterator[list[str]]:
    return (given[i : i + size] for i in range(0, len(given), size))


def test_sources_are_mixed_by_weight_and_each_has_its_own_epochs(shards: Path, tmp_path: Path) -> None:
    other = write_tar(tmp_path / "b.tar", [m for i in range(900, 910) for m in sample(i)])
    dataset = make([{"shards": str(shards), "weight": 3.0}, {"shards": [str(other)], "weight": 1.0, "name": "b"}])
    given = keys(islice(dataset, 160 * 4))
    counts = Counter(key >= "00900" for key in given)
    assert 130 < counts[True] < 190
    assert {count - counts[True] // 10 for key, count in Counter(given).items() if key >= "00900"} <= {0, 1}


def test_held_out_keys_never_come_and_all_others_do(shards: Path) -> None:
    some = keys(make(shards, epochs=1, held_out=0.25))
    more = keys(make(shards, epochs=1, held_out=0.1))
    assert set(some) < set(more) < set(KEYS) and len(some) == len(set(some)) and 70 < len(some) < 110


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@example(
    began=st.integers(0, 1000),
    ranks=st.integers(1, 7),
    workers=st.integers(1, 5),
    batch=st.integers(1, 6),
    rounds=st.integers(0, 9),
)
def test_shares_tile_the_line_whatever_the_layout(began: int, ranks: int, workers: int, batch: int, rounds: int) -> None:
    """After ``rounds`` batches of each rank, taken from its workers in turn, no position is missing or repeated."""
    given, done = [], []
    for rank in range(ranks):
        for worker in range(workers):
            share = Share(rank, ranks, worker, workers, batch)
            taken = len(range(worker, rounds, workers)) * batch
            given += [share.position(began, n) for n in range(taken)]
            done.append(share.done(began, taken))
    assert sorted(given) == list(range(began, began + rounds * batch * ranks))
    assert min(done) == began + rounds * batch * ranks


# --- state


def elastic_steps(
    shards: Path, steps: int, ranks: int, workers: int, micro: int | None, states: Any
) -> tuple[list[set[str]], Any]:
    given: list[set[str]] = [set() for _ in range(steps)]
    saved = []
    for rank in range(ranks):
        dataset = make(shards, rank=rank, world_size=ranks, micro_batch=micro)
        if states is not None:
            dataset.load_state_dict(states)
        loader = StatefulDataLoader(batches(dataset), batch_size=None, num_workers=workers)
        running = iter(loader)
        for step in given:
            for _ in range(12 // ranks // dataset.micro_batch):
                step.update(next(running))
        saved.append(json.loads(json.dumps(loader.state_dict())))
    return given, saved


def test_a_state_goes_on_under_any_ranks_and_workers_sample_for_sample(shards: Path) -> None:
    undisturbed = [set(part) for part in grouped(keys(islice(make(shards), 12 * 40)), 12)]
    given: list[set[str]] = []
    states = None
    for n, (steps, ranks, workers, micro) in enumerate(
        [(1, 1, 0, None), (4, 2, 3, None), (7, 3, 2, 2), (5, 1, 3, 4), (9, 4, 0, 1), (3, 6, 2, None), (11, 2, 1, 3)]
    ):
        more, states = elastic_steps(shards, steps, ranks, workers, micro, states)
        given += more
        states = states[n % ranks]  # that of any rank
    assert given == undisturbed


def test_states_of_all_ranks_say_the_same(shards: Path) -> None:
    _, states = elastic_steps(shards, 3, 4, 0, None, None)
    inner = [state["_snapshot"] if "_snapshot" in state else state["dataset_state"] for state in states]
    assert [state["data"] for state in inner] == [inner[0]["data"]] * 4
    assert inner[0]["data"]["cursors"] == [36]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_by_itself_with_the_same_workers(shards: Path, workers: int) -> None:
    def loader() -> Any:
        return StatefulDataLoader(batches(make(shards, epochs=1)), batch_size=None, num_workers=workers)

    whole = list(loader())
    assert len(whole) == 10
    for stop in (0, 1, 4, 9, 10):
        first = loader()
        head = list(islice(iter(first), stop))
        second = loader()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert head + list(islice(iter(second), 10 - stop)) == whole, stop


def test_torch_batches_need_no_pipeline(shards: Path) -> None:
    def loader() -> Any:
        return StatefulDataLoader(make(shards), batch_size=12, num_workers=2, collate_fn=keys)

    first = loader()
    running = iter(first)
    head = [next(running) for _ in range(5)]
    dataset = make(shards)
    dataset.load_state_dict(first.state_dict())
    assert [key for part in head for key in part] + keys(islice(dataset, 60)) == keys(islice(make(shards), 120))


def test_a_plain_webdataset_pipeline_has_its_state_in_its_data_set(shards: Path) -> None:
    dataset, other = make(shards), make(shards)
    pipeline = iter(wds.DataPipeline(dataset, wds.map(lambda each: each["__key__"]), wds.batched(12, collation_fn=list)))
    head = [next(pipeline) for _ in range(3)]
    other.load_state_dict(dataset.state_dict())
    assert [key for part in head for key in part] + keys(islice(other, 12)) == keys(islice(make(shards), 48))


@pytest.mark.parametrize("workers", [0, 2])
def test_where_a_later_stage_drops_samples_a_state_leaves_none_out(shards: Path, workers: int) -> None:
    def loader() -> Any:
        some = make(shards, epochs=1).select(lambda each: int(each["__key__"]) % 7 > 0)
        pipeline = some.map(lambda each: each["__key__"]).batched(12, collation_fn=list)
        return StatefulDataLoader(pipeline, batch_size=None, num_workers=workers)

    for stop in (0, 1, 4, 8):
        first = loader()
        head = {key for part in islice(iter(first), stop) for key in part}
        pipeline = batches(make(shards, epochs=1))
        pipeline.load_state_dict(first.state_dict())
        assert head | {key for part in pipeline for key in part} >= {key for key in KEYS if int(key) % 7}


def test_a_new_pass_and_a_state_begin_at_the_last_whole_micro_batch(shards: Path) -> None:
    whole = keys(islice(make(shards), 36))
    dataset = make(shards)
    assert keys(islice(dataset, 17)) == whole[:17]
    copy = make(shards)
    copy.load_state_dict(dataset.state_dict())
    assert keys(islice(dataset, 12)) == keys(islice(copy, 12)) == whole[12:24]


def test_a_pass_that_goes_on_from_a_state_ends_with_its_epoch(shards: Path) -> None:
    dataset, rest = make(shards, epochs=1), make(shards, epochs=1)
    head = keys(islice(dataset, 48))
    rest.load_state_dict(dataset.state_dict())
    assert sorted(head + keys(rest)) == KEYS
    assert sorted(keys(rest)) == KEYS


def test_a_window_is_counted_from_its_anchor_and_nothing_before_it_is_opened(shards: Path, tmp_path: Path) -> None:
    dataset = make(shards)
    for _ in islice(dataset, 12 * 15):
        pass
    other = make(shards, index_dir=tmp_path / "new")
    other.load_state_dict(dataset.state_dict())
    next(iter(other))
    assert len(list((tmp_path / "new").glob("*.idx"))) == 2, "those of one window"


@pytest.mark.parametrize(
    ("change", "named"), [({"seed": 6}, "seed"), ({"shuffle_shards": 3}, "shuffle_shards"), ({"held_out": 0.1}, "shards")]
)
def test_a_state_of_another_order_is_refused(shards: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=f"was saved with {named} "):
        make(shards, **change).load_state_dict(make(shards).state_dict())


@pytest.mark.parametrize("state", [None, {}, {"format": "megamoe.data.ShardDataset/1"}, {"a": [1, "x"]}])
def test_what_is_no_state_is_refused_in_one_line(shards: Path, state: Any) -> None:
    with pytest.raises(DataError, match=r"^data state: [^\n]*$"):
        make(shards).load_state_dict(state)


def test_workers_of_other_layouts_do_not_take_each_others_states(shards: Path) -> None:
    def loader(**settings: Any) -> Any:
        return StatefulDataLoader(batches(make(shards, **settings)), batch_size=None, num_workers=1)

    first = loader()
    next(iter(first))
    second = loader(rank=0, world_size=2)
    second.load_state_dict(first.state_dict())
    with pytest.raises(DataError, match="load it into the data set, not into its loader"):
        next(iter(second))
    del second
    gc.collect()  # or the loader that the exception holds is deleted in a worker forked later, and complains there


def test_a_state_that_lags_behind_its_loader_is_refused(shards: Path) -> None:
    loader = StatefulDataLoader(batches(make(shards)), batch_size=None, num_workers=2, snapshot_every_n_steps=4)
    list(islice(iter(loader), 6))
    with pytest.raises(DataError, match="snapshot_every_n_steps"):
        make(shards).load_state_dict(loader.state_dict())


# --- what cannot be read


def test_a_cut_shard_raises_or_is_quarantined_by_the_handler(shards: Path, tmp_path: Path) -> None:
    names = [str(write_tar(tmp_path / f"{n}.tar", [m for i in range(9) for m in sample(n * 9 + i)])) for n in range(3)]
    Path(names[1]).write_bytes(Path(names[1]).read_bytes()[:5000])
    with pytest.raises(BadShard, match=r"1\.tar: truncated at byte 5000"):
        list(make(names, epochs=1))
    errors: list[Exception] = []
    for rank in range(2):
        dataset = make(names, epochs=1, rank=rank, world_size=2, handler=lambda error: errors.append(error) or True)
        assert len(keys(dataset)) == 9
    assert [type(error) for error in errors] == [BadShard, BadShard] and "1.tar" in str(errors[0])


def test_a_shard_that_is_gone_keeps_its_places_and_its_samples_are_counted(shards: Path, tmp_path: Path) -> None:
    names = [str(write_tar(tmp_path / f"{n}.tar", [m for i in range(9) for m in sample(n * 9 + i)])) for n in range(3)]
    for name in names:
        learn_index(name, tmp_path / "index")
    whole = [keys(make(names, epochs=1, index_dir=tmp_path / "index", rank=r, world_size=2)) for r in range(2)]
    data = [
        make(names, epochs=1, index_dir=tmp_path / "index", rank=r, world_size=2, handler=wds.ignore_and_continue)
        for r in range(2)
    ]
    os.unlink(names[2])
    given = [keys(each) for each in data]
    assert given == [[key for key in each if key < "00018"] for each in whole]
    assert sum((each.lost for each in data), Counter()) == {"shard": 9}
    assert data[0].state_dict()["lost"]["shard"] == data[0].lost["shard"]
    assert data[0].state_dict()["data"]["quarantine"] == {"2.tar": 9}


def test_a_shard_that_nobody_counted_is_quarantined_by_a_single_reader_only(shards: Path, tmp_path: Path) -> None:
    names = [str(write_tar(tmp_path / f"{n}.tar", [m for i in range(9) for m in sample(n * 9 + i)])) for n in range(3)]
    alone = make(names, epochs=1, handler=wds.ignore_and_continue)
    one_of_two = make(names, epochs=1, handler=wds.ignore_and_continue, rank=0, world_size=2)
    os.unlink(names[2])
    assert sorted(keys(alone)) == KEYS[:18]
    with pytest.raises(DataError, match="its samples have not been counted"):
        list(one_of_two)


def test_incomplete_samples_raise_or_are_counted(tmp_path: Path) -> None:
    members = [*sample(0), ("00001.jpg", jpeg(1)), *sample(2), *sample(0)]
    shard = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(CorruptSample, match=r"a\.tar#0000[01]: incomplete: "):
        list(make(shard, epochs=1))
    errors: list[str] = []
    dataset = make(shard, epochs=1, handler=lambda error: errors.append(str(error)) or True)
    assert sorted(keys(dataset)) == ["00000", "00002"]
    assert dataset.lost == {"incomplete": 2} and "comes twice" in " ".join(errors)


def test_a_handler_that_stops_ends_the_iteration(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("x", b"1")])
    assert list(make(shard, handler=wds.ignore_and_stop)) == []


def test_when_no_shard_is_left_it_says_so(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("x", b"1")])
    with pytest.raises(DataError, match=r"a\.tar: no samples .* all shards are quarantined"):
        list(make(shard, handler=wds.ignore_and_continue))


def test_losses_of_workers_are_in_the_state(shards: Path, tmp_path: Path) -> None:
    members = [m for i in range(40) for m in sample(i)]
    shard = write_tar(tmp_path / "a.tar", [*members, ("x.jpg", jpeg(1)), ("y.jpg", jpeg(2))])
    dataset = make(shard, epochs=1, handler=wds.ignore_and_continue, micro_batch=4)
    loader = StatefulDataLoader(batches(dataset), batch_size=None, num_workers=3)
    assert len([key for batch in loader for key in batch]) == 40
    dataset.load_state_dict(loader.state_dict())
    assert dataset.lost == {"incomplete": 2}


# --- arguments


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"global_batch": 10, "rank": 0, "world_size": 4}, "global_batch 10: not a multiple of 4 ranks"),
        ({"micro_batch": 5}, "global_batch 12: not a multiple of micro_batch 5 x 1 ranks"),
        ({"micro_batch": 0}, "global_batch 12"),
        ({"global_batch": 0}, "global_batch 0"),
        ({"shuffle_shards": 0}, "shuffle_shards 0: there is no unshuffled order"),
        ({"shuffle_shards": None}, "shuffle_shards None"),
        ({"shuffle_shards": -2}, "shuffle_shards -2"),
        ({"epochs": 0}, "epochs 0"),
        ({"seed": -1}, "seed -1"),
        ({"held_out": 1.0}, "held_out 1.0"),
        ({"rank": 0}, "give both or neither"),
        ({"rank": 2, "world_size": 2}, "rank 2: is not one of 2 ranks"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(shards: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as raised:
        make(shards, **settings)
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_wrong_shards_are_named(shards: Path) -> None:
    with pytest.raises(UserError, match="urls: no shards"):
        make([])
    with pytest.raises(UserError, match=r"urls\.0\.wieght"):
        make([{"shards": str(shards), "wieght": 2.0}])
    with pytest.raises(UserError, match="epochs 1: 2 sources"):
        make([{"shards": str(shards / "00000.tar")}, {"shards": str(shards / "00001.tar")}], epochs=1)


def test_ranks_come_from_the_environment_or_torch_distributed(
    shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert keys(islice(make(shards), 8)) == keys(islice(make(shards, rank=1, world_size=3), 8))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert make(shards).micro_batch == 12
    finally:
        torch.distributed.destroy_process_group()
