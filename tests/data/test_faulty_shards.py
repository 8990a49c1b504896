"""Shards that are damaged, replaced or not to be had, through the loader: named with the reason, and quarantined whole."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from megamoe.core.errors import DataError
from megamoe.data.loader import lane as lane_module
from megamoe.data.loader.step_loader import StepLoader
from megamoe.data.remote.cache import CacheUnusable, ShardCache
from megamoe.data.remote.stream import Patience
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import BadShard, DataSet, Source
from megamoe.data.shards.held_out import key_hash
from megamoe.data.shards.index import learn_index
from tests.data import shard_server
from tests.data.pairs import Seen, make_loader, pair, see
from tests.data.shard_factory import write_tar
from tests.data.shard_server import ShardServer, serving

QUICK = Patience(connect=2, read=2, tries=3, first_wait=0.01, longest_wait=0.1)
SHARDS, EACH = 4, 10
BAD = 2  # the shard that something happens to
STEPS = 8  # of four lanes and three pictures: more than two epochs


def write_shards(folder: Path) -> list[Path]:
    return [
        write_tar(folder / f"{s}.tar", [m for n in range(s * EACH, (s + 1) * EACH) for m in pair(n)]) for s in range(SHARDS)
    ]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_shards(tmp_path / "shards")


@pytest.fixture
def data(shards: list[Path], tmp_path: Path) -> DataSet:
    return DataSet([Source("0", [str(shard) for shard in shards])], tmp_path / "index")


@pytest.fixture
def server(shards: list[Path]) -> Iterator[ShardServer]:
    with serving() as server:
        server.objects |= {f"/{shard.name}": shard.read_bytes() for shard in shards}
        yield server


@pytest.fixture
def remote(server: ShardServer, tmp_path: Path) -> DataSet:
    return DataSet([Source("0", [f"{server.url}/{n}.tar?sig=hidden" for n in range(SHARDS)])], tmp_path / "index")


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", None, QUICK)


def ids(*shards: int) -> set[str]:
    return {f"{s}.tar#{n:05d}" for s in shards for n in range(s * EACH, (s + 1) * EACH)}


def until_bad(loader: StepLoader, seen: Seen) -> BadShard:
    """Take steps until a shard cannot be used."""
    for _ in range(3 * STEPS):
        try:
            seen.add(next(loader))
        except BadShard as error:
            assert "\n" not in str(error) and "hidden" not in str(error) + error.shard
            return error
    raise AssertionError("nothing was amiss")


def go_on_without(loader: StepLoader, bad: BadShard, seen: Seen) -> None:
    loader.quarantine(loader.state, {bad.shard: max(0, bad.count)})
    for _ in range(STEPS):
        seen.add(next(loader))


def cut(at: Callable[[bytes], int]) -> Callable[[Path], None]:
    return lambda shard: os.truncate(shard, at(shard.read_bytes()))


def third_member(tar: bytes) -> int:
    """Return where the header of the third member begins."""
    return tar.index(f"{BAD * EACH + 1:05d}.jpg".encode())


def spoil_header(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[third_member(bytes(content)) + 110] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason", "workers"),
    [
        (cut(third_member), "truncated at byte", 0),
        (cut(lambda tar: third_member(tar) + 200), "truncated at byte", 0),
        (cut(lambda tar: third_member(tar) + 700), "truncated at byte", 0),
        (cut(lambda _: 0), "truncated at byte 0", 0),
        (spoil_header, "damaged header at byte", 0),
        (spoil_header, "damaged header at byte", 2),
        (lambda shard: shard.write_text("<html>503</html>" * 99), "not a tar file", 0),
        (os.unlink, "cannot be opened (No such file", 0),
    ],
    ids=["boundary", "in-header", "in-data", "empty", "bad-header", "bad-header-from-a-worker", "page", "gone"],
)
def test_a_damaged_shard_is_named_and_the_others_are_read_whole(
    data: DataSet, shards: list[Path], tokenizer: Tokenizer, damage: Callable[[Path], None], reason: str, workers: int
) -> None:
    damage(shards[BAD])
    seen = Seen(tokenizer)
    with make_loader(data, tokenizer, workers=workers) as loader:
        bad = until_bad(loader, seen)
        assert str(bad).startswith(f"shard {shards[BAD]}: {reason}") and (bad.shard, bad.count) == (f"{BAD}.tar", -1)
        go_on_without(loader, bad, seen)
    assert set(seen.used) == ids(0, 1, 3) and not seen.lost
    first, last = min(seen.used.values()), max(seen.used.values())
    assert last - first <= 1, "each epoch has each sample once"


def test_samples_of_a_shard_that_goes_bad_later_are_lost_one_by_one(
    data: DataSet, shards: list[Path], tokenizer: Tokenizer
) -> None:
    for shard in shards:
        learn_index(shard, data.index_dir)
    os.truncate(shards[BAD], 5000)
    seen = Seen(tokenizer)
    with make_loader(data, tokenizer) as loader:
        bad = until_bad(loader, seen)
        assert "is older than its shard" in str(bad)
        assert loader.count(bad.shard, fetch=False) == EACH
        loader.quarantine(loader.state, {bad.shard: EACH})
        for _ in range(STEPS):
            seen.add(next(loader))
    assert set(seen.used) == ids(0, 1, 3)
    names = Counter(each.id for each in seen.losses)
    assert set(names) == {f"{BAD}.tar#sample {n}" for n in range(EACH)}
    assert seen.counters[0, "lost_shard"] == len(seen.losses) > EACH
    assert set(seen.lost.values()) == {"shard: in quarantine"}


def test_a_shard_overwritten_while_it_is_open_gives_no_wrong_pair(
    data: DataSet, shards: list[Path], tokenizer: Tokenizer
) -> None:
    seen = Seen(tokenizer)
    with make_loader(data, tokenizer) as loader:
        while not set(seen.used) & ids(BAD):
            seen.add(next(loader))
        before = set(seen.used)
        members = [m for n in range(500, 500 + EACH) for m in reversed(pair(n, key=f"{n:05d}" + "x" * (n % 3)))]
        with open(shards[BAD], "r+b") as file:  # the same file, and not one byte where it was
            file.write(write_tar(shards[BAD].with_name("other"), members).read_bytes())
            file.truncate()
        bad = until_bad(loader, seen)
        assert "changed at byte" in str(bad) and "megamoe data index" in str(bad) and bad.count == EACH
        go_on_without(loader, bad, seen)
    assert set(seen.used) == ids(0, 1, 3) | before & ids(BAD)
    assert max(seen.numbers.values()) < 500


def test_a_page_in_place_of_a_tar_does_not_stay_in_the_cache(
    server: ShardServer, remote: DataSet, cache: ShardCache, tokenizer: Tokenizer
) -> None:
    good, server.objects[f"/{BAD}.tar"] = server.objects[f"/{BAD}.tar"], b"<html>please log in</html>" * 50
    seen = Seen(tokenizer)
    with make_loader(remote, tokenizer, cache=cache) as loader:
        bad = until_bad(loader, seen)
        assert f"{BAD}.tar?***: not a tar file; check the path" in str(bad)
        assert not any(b"<html>" in path.read_bytes() for path in cache.folder.glob("*.tar"))
        go_on_without(loader, bad, seen)
        assert set(seen.used) == ids(0, 1, 3)
        asked = len(server.asked)
        server.objects[f"/{BAD}.tar"] = good
    with make_loader(remote, tokenizer, cache=cache) as loader:  # a new run, after the server was mended
        seen = see(loader, tokenizer, STEPS)
    assert set(seen.used) == ids(*range(SHARDS)) and not seen.lost
    assert [path for path, _ in server.asked[asked:]] == [f"/{BAD}.tar?sig=hidden"]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([shard_server.status(404)] * 9, "cannot be had, 1 try (HTTP 404 Not Found); check the name"),
        ([shard_server.status(503)] * 9, "cannot be had, 3 tries (HTTP 503 Service Unavailable); check that"),
        ([shard_server.cut_after(600)] * 9, "cannot be had, 3 tries ("),
        ([shard_server.without_length(600)] * 9, "cannot be had, 3 tries (broken off after 600 bytes, without the end"),
    ],
    ids=["404", "503", "cut", "cut-without-length"],
)
def test_a_shard_that_is_not_available_is_quarantined_whole(
    server: ShardServer, remote: DataSet, cache: ShardCache, tokenizer: Tokenizer, answers: list[Any], reason: str
) -> None:
    server.answers[f"/{BAD}.tar"] = answers
    seen = Seen(tokenizer)
    with make_loader(remote, tokenizer, cache=cache) as loader:
        bad = until_bad(loader, seen)
        assert f"/{BAD}.tar?***: {reason}" in str(bad) and (bad.shard, bad.count) == (f"{BAD}.tar", -1)
        go_on_without(loader, bad, seen)
    assert set(seen.used) == ids(0, 1, 3) and not seen.lost
    assert len(list(cache.folder.glob("*.tar"))) == SHARDS - 1 and not list(cache.folder.glob("*.part"))


@pytest.mark.parametrize(
    ("answers", "retries"),
    [
        ([shard_server.status(503), shard_server.status(503)], 2),
        ([shard_server.cut_after(3_000), shard_server.closed_after(4_000)], 2),
        ([shard_server.without_length(3_000)], 1),
        ([shard_server.without_range(3_000)], 1),
    ],
    ids=["503", "cut", "cut-without-length", "cut-without-range"],
)
def test_a_fault_that_passes_costs_no_sample_and_is_counted(
    server: ShardServer, remote: DataSet, cache: ShardCache, tokenizer: Tokenizer, answers: list[Any], retries: int
) -> None:
    server.answers[f"/{BAD}.tar"] = answers
    with make_loader(remote, tokenizer, cache=cache) as loader:
        seen = see(loader, tokenizer, STEPS)
    assert set(seen.used) == ids(*range(SHARDS)) and not seen.lost
    assert (seen.reading["retries"], seen.reading["downloads"]) == (retries, SHARDS)
    assert seen.reading["received"] >= sum(len(body) for body in server.objects.values())


def test_ranks_and_workers_of_a_node_download_each_shard_once(
    server: ShardServer, remote: DataSet, data: DataSet, cache: ShardCache, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(make_loader(remote, tokenizer, rank=rank, ranks=2, workers=2, cache=cache))
            for rank in (0, 1)
        ]
        seen = [see(loader, tokenizer, STEPS) for loader in loaders]
    assert Counter(path for path, _ in server.asked) == {f"/{n}.tar?sig=hidden": 1 for n in range(SHARDS)}
    assert sum(each.reading["downloads"] for each in seen) == SHARDS
    with ExitStack() as stack:
        loaders = [stack.enter_context(make_loader(data, tokenizer, rank=rank, ranks=2)) for rank in (0, 1)]
        assert [see(loader, tokenizer, STEPS).used for loader in loaders] == [each.used for each in seen]


def test_a_shard_that_its_server_replaced_is_not_read_by_the_old_index(
    server: ShardServer, remote: DataSet, cache: ShardCache, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with make_loader(remote, tokenizer, cache=cache) as loader:
        see(loader, tokenizer, STEPS)
    members = [m for n in range(500, 500 + EACH) for m in reversed(pair(n))]
    server.objects[f"/{BAD}.tar"] = write_tar(tmp_path / "other.tar", members).read_bytes()
    seen, empty = Seen(tokenizer), ShardCache(tmp_path / "another node", None, QUICK)
    with make_loader(remote, tokenizer, cache=empty) as loader:
        bad = until_bad(loader, seen)
        assert f"is older than its shard {server.url}/{BAD}.tar?***: restore the shard" in str(bad)
        assert loader.count(bad.shard, fetch=True) == EACH
        assert len(list(empty.folder.glob("*.tar"))) < SHARDS, "the new bytes must not stay"
        loader.quarantine(loader.state, {bad.shard: EACH})
        for _ in range(STEPS):
            seen.add(next(loader))
    assert set(seen.used) == ids(0, 1, 3)
    assert set(seen.lost) == {f"{BAD}.tar#sample {n}" for n in range(EACH)}


def test_what_another_rank_can_read_counts_though_it_has_not_come_to_it(
    server: ShardServer, remote: DataSet, cache: ShardCache, tokenizer: Tokenizer
) -> None:
    with make_loader(remote, tokenizer, cache=cache) as loader:
        assert loader.count(f"{BAD}.tar", fetch=False) == -1 and not server.asked
        assert loader.count(f"{BAD}.tar", fetch=True) == EACH
        assert loader.count(f"{BAD}.tar", fetch=False) == EACH and len(server.asked) == 1
        server.answers["/0.tar"] = [shard_server.status(404)]
        assert loader.count("0.tar", fetch=True) == -1


def test_a_quarantine_holds_when_the_data_moves(data: DataSet, shards: list[Path], tokenizer: Tokenizer) -> None:
    os.truncate(shards[BAD], 5000)
    seen = Seen(tokenizer)
    with make_loader(data, tokenizer) as loader:
        go_on_without(loader, until_bad(loader, seen), seen)
        state = loader.state
        expected = see(loader, tokenizer, STEPS).used
    moved = write_shards(shards[0].parent.with_name("mended and moved"))
    there = DataSet([Source("0", [str(shard) for shard in moved])], data.index_dir)
    with make_loader(there, tokenizer) as loader:
        loader.go_on_from(state)
        assert see(loader, tokenizer, STEPS).used == expected


def test_a_quarantine_of_many_samples_in_a_row_stops_nothing_but_one_of_all_shards_does(
    data: DataSet, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "MAX_LOST_IN_A_ROW", 20)
    seen = Seen(tokenizer)
    with make_loader(data, tokenizer) as loader:
        loader.quarantine(loader.state, {f"{n}.tar": 2000 for n in range(SHARDS - 1)})
        while len(seen.used) < EACH:
            seen.add(next(loader))
        assert set(seen.used) == ids(SHARDS - 1) and len(seen.losses) > 1000
        loader.quarantine(loader.state, {f"{SHARDS - 1}.tar": EACH})
        with pytest.raises(DataError, match=r"data.train: all shards of source 0 are in quarantine"):
            next(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_share_held_out_that_leaves_nothing_is_one_line(data: DataSet, tokenizer: Tokenizer, workers: int) -> None:
    all_of_it = DataSet(data.sources, data.index_dir, held_out=0.999999)
    with make_loader(all_of_it, tokenizer, workers=workers) as loader:
        with pytest.raises(
            DataError, match=r"^data.train: no shard of source 0 has a sample to train on.*held_out"
        ) as raised:
            next(loader)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_cannot_be_written_is_no_fault_of_the_shard(
    remote: DataSet, tokenizer: Tokenizer, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "file").touch()
    with make_loader(remote, tokenizer, workers=workers, cache=ShardCache(tmp_path / "file" / "cache", None)) as loader:
        with pytest.raises(DataError, match=r"shard cache .*cannot be used") as raised:
            next(loader)
        assert not isinstance(raised.value, BadShard) and isinstance(
            raised.value, CacheUnusable if not workers else DataError
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cached_copy_that_is_older_than_the_index_is_fetched_anew_once(
    server: ShardServer, remote: DataSet, cache: ShardCache, tokenizer: Tokenizer, tmp_path: Path, workers: int
) -> None:
    name = remote.sources[0].shards[BAD]
    cache.open(name)[0].close()
    members = [m for n in range(500, 500 + EACH) for m in pair(n)]
    server.objects[f"/{BAD}.tar"] = write_tar(tmp_path / "other.tar", members).read_bytes()
    other_node = ShardCache(tmp_path / "another node", None, QUICK)
    with make_loader(remote, tokenizer, cache=other_node) as loader:  # which makes the index of the new one
        see(loader, tokenizer, STEPS)
    server.asked.clear()
    with make_loader(remote, tokenizer, cache=cache, workers=workers) as loader:
        seen = see(loader, tokenizer, STEPS)
    assert f"{BAD}.tar#00500" in seen.used and not seen.lost
    assert Counter(path for path, _ in server.asked) == {f"/{n}.tar?sig=hidden": 1 for n in range(SHARDS)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_shards_in_quarantine_and_shards_that_are_held_out_is_an_error(
    shards: list[Path], tmp_path: Path, tokenizer: Tokenizer, workers: int
) -> None:
    share = 0.5
    keys = [f"k{n}" for n in range(200)]
    ours = [key for key in keys if key_hash(key) < (1 << 63)]
    held = [key for key in keys if key not in ours]
    folder = tmp_path / "small"
    write_tar(folder / "held.tar", [m for n, key in enumerate(held[:4]) for m in pair(n, key)])
    write_tar(folder / "aside.tar", [m for n, key in enumerate(ours[:4]) for m in pair(n, key)])
    sources = [
        Source("large", [str(shard) for shard in shards]),
        Source("small", [str(folder / "held.tar"), str(folder / "aside.tar")]),
    ]
    data = DataSet(sources, tmp_path / "index", share, {"aside.tar": 4})
    with (
        make_loader(data, tokenizer, workers=workers) as loader,
        pytest.raises(DataError, match="no shard of source 1 has"),
    ):
        for _ in range(40):
            next(loader)
