"""Shards on the local disk: one download per node, whole files only, a bound that holds."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megamoe.core.errors import DataError
from megamoe.data.remote.cache import Fetched, ShardCache
from megamoe.data.remote.download import ShardUnavailable
from megamoe.data.remote.stream import Patience
from tests.data import shard_server
from tests.data.shard_factory import write_tar
from tests.data.shard_server import Handler, ShardServer, serving

QUICK = Patience(connect=2, read=2, tries=3, first_wait=0.01, longest_wait=0.1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Make four tars of one size."""
    folder = tmp_path_factory.mktemp("shards")
    return [write_tar(folder / f"{n}.tar", [("0.txt", bytes([65 + n]) * 20_000)]).read_bytes() for n in range(4)]


@pytest.fixture
def server(shards: list[bytes]) -> Iterator[ShardServer]:
    with serving() as server:
        server.objects |= {f"/{n}.tar": data for n, data in enumerate(shards)}
        server.objects |= {"/a/00000.tar": shards[0], "/b/00000.tar": shards[1]}
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", None, QUICK)


def fetch(cache: ShardCache, url: str) -> Fetched:
    """Fetch a shard into the cache."""
    file, fetched = cache.open(url)
    file.close()
    return fetched


def files(cache: ShardCache) -> list[str]:
    """List the files in the cache, by suffix."""
    return sorted(path.suffix for path in cache.folder.iterdir() if path.is_file())


def test_a_second_fetch_asks_nobody(server: ShardServer, cache: ShardCache, shards: list[bytes]) -> None:
    url = f"{server.url}/0.tar?sig=hidden"
    first, second = fetch(cache, url), fetch(cache, url)
    assert first.path.read_bytes() == shards[0]
    assert (first.hit, first.received, first.retries, first.size) == (False, len(shards[0]), 0, len(shards[0]))
    assert (second.hit, second.received, second.path, second.size) == (True, 0, first.path, first.size)
    assert first.identity == second.identity == shard_server.etag(shards[0])
    assert len(server.asked) == 1 and files(cache) == [".json", ".tar"]
    about = next(cache.folder.glob("*.json")).read_text()
    assert json.loads(about)["size"] == len(shards[0]) and "hidden" not in about


def test_equal_file_names_never_mix(server: ShardServer, cache: ShardCache, shards: list[bytes]) -> None:
    urls = [f"{server.url}/a/00000.tar", f"{server.url}/b/00000.tar", f"{server.url}/b/00000.tar?version=2"]
    paths = [fetch(cache, url).path for url in urls]
    assert [path.read_bytes() for path in paths] == [shards[0], shards[1], shards[1]]
    assert len(set(paths)) == 3


def test_a_pipe_is_cached_and_known_by_its_bytes(tmp_path: Path, cache: ShardCache, shards: list[bytes]) -> None:
    (tmp_path / "a.tar").write_bytes(shards[0])
    url = f"pipe:cat {tmp_path}/a.tar"
    first = fetch(cache, url)
    assert first.path.read_bytes() == shards[0] and first.identity.startswith("sha256:")
    (tmp_path / "a.tar").unlink()
    assert fetch(cache, url).hit


@pytest.mark.parametrize("answer", [shard_server.status(404), shard_server.status(500), shard_server.cut_after(5_000)])
def test_a_failure_leaves_nothing_behind(server: ShardServer, cache: ShardCache, answer: Any) -> None:
    server.answers["/0.tar"] = [answer] * 3
    with pytest.raises(ShardUnavailable):
        fetch(cache, f"{server.url}/0.tar")
    assert files(cache) == []
    server.answers["/0.tar"] = []
    assert not fetch(cache, f"{server.url}/0.tar").hit


def test_retries_are_counted(server: ShardServer, cache: ShardCache, shards: list[bytes]) -> None:
    server.answers["/0.tar"] = [shard_server.status(503), shard_server.cut_after(5_000)]
    fetched = fetch(cache, f"{server.url}/0.tar")
    assert (fetched.retries, fetched.received) == (2, len(shards[0])) and fetched.seconds > 0


def test_what_was_forgotten_is_downloaded_again(server: ShardServer, cache: ShardCache, shards: list[bytes]) -> None:
    url = f"{server.url}/0.tar"
    fetch(cache, url)
    server.objects["/0.tar"] = shards[1]
    assert fetch(cache, url).path.read_bytes() == shards[0]
    cache.forget(url)
    fetched = fetch(cache, url)
    assert not fetched.hit and fetched.path.read_bytes() == shards[1]


@pytest.mark.parametrize("damage", ["short", "no json", "cut json"])
def test_a_damaged_entry_does_not_count(server: ShardServer, cache: ShardCache, shards: list[bytes], damage: str) -> None:
    url = f"{server.url}/0.tar"
    path = fetch(cache, url).path
    about = path.with_suffix(".json")
    if damage == "short":
        os.truncate(path, 100)
    elif damage == "no json":
        about.unlink()
    else:
        about.write_text('{"size":')
    assert not fetch(cache, url).hit
    assert path.read_bytes() == shards[0]


def test_the_shards_used_longest_ago_go_first(server: ShardServer, tmp_path: Path, shards: list[bytes]) -> None:
    limit = 2 * len(shards[0])
    cache = ShardCache(tmp_path / "cache", limit, QUICK)
    urls = [f"{server.url}/{n}.tar" for n in range(4)]
    fetch(cache, urls[0])
    fetch(cache, urls[1])
    fetch(cache, urls[0])  # used again, so 1 is the older one now
    fetch(cache, urls[2])
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= limit
    asked = len(server.asked)
    assert fetch(cache, urls[0]).hit and fetch(cache, urls[2]).hit and len(server.asked) == asked
    assert not fetch(cache, urls[1]).hit


def test_a_shard_that_is_open_stays_readable(server: ShardServer, tmp_path: Path, shards: list[bytes]) -> None:
    cache = ShardCache(tmp_path / "cache", len(shards[0]), QUICK)
    file, fetched = cache.open(f"{server.url}/0.tar")
    with file:
        fetch(cache, f"{server.url}/1.tar")
        assert not fetched.path.exists()
        assert file.read() == shards[0]


def test_a_shard_larger_than_the_limit_is_refused(server: ShardServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1_000, QUICK)
    with pytest.raises(DataError, match="1000 are allowed; allow a larger cache"):
        fetch(cache, f"{server.url}/0.tar")
    assert files(cache) == []


def test_what_dead_processes_left_is_removed(server: ShardServer, cache: ShardCache) -> None:
    cache.folder.mkdir()
    (cache.folder / f"{'0' * 64}.part").write_bytes(b"half")
    (cache.folder / f"{'1' * 64}.tar").write_bytes(b"without json")
    fetch(cache, f"{server.url}/0.tar")
    assert files(cache) == [".json", ".tar"]


def test_a_full_disk_names_folder_and_remedy(
    server: ShardServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.open

    def full(name: Any, *arguments: Any, **options: Any) -> Any:
        if str(name).endswith(".part"):
            real(name, "wb").close()
            return real("/dev/full", "w+b", buffering=0)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(DataError, match=f"shard cache {cache.folder}: the disk is full .*free space"):
        fetch(cache, f"{server.url}/0.tar")
    assert files(cache) == []


def test_a_folder_that_cannot_be_made_is_one_line(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be used \(Not a directory\); choose a folder"):
        fetch(ShardCache(tmp_path / "file" / "cache", None), f"{server.url}/0.tar")


FETCH = """
import sys
from pathlib import Path
from megamoe.data.remote.cache import ShardCache
_, fetched = ShardCache(Path(sys.argv[1]), None).open(sys.argv[2])
print(fetched.hit, fetched.path)
"""


def start(cache: ShardCache, url: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", FETCH, str(cache.folder), url], stdout=subprocess.PIPE, text=True)


def slow(handler: Handler, body: bytes) -> None:
    """Send half of the body, and the rest when all processes have started."""
    status, headers, data = shard_server.part(handler, body)
    handler.begin(status, **headers)
    handler.wfile.write(data[:5_000])
    handler.wfile.flush()
    time.sleep(2)
    handler.wfile.write(data[5_000:])


def test_many_processes_make_one_download(server: ShardServer, cache: ShardCache, shards: list[bytes]) -> None:
    server.answers["/0.tar"] = [slow]
    processes = [start(cache, f"{server.url}/0.tar") for _ in range(5)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(hit for hit, _ in said) == ["False", "True", "True", "True", "True"]
    assert len(server.asked) == 1
    assert Path(said[0][1]).read_bytes() == shards[0]


def test_a_killed_process_blocks_nobody(server: ShardServer, cache: ShardCache, shards: list[bytes]) -> None:
    server.answers["/0.tar"] = [slow]
    process = start(cache, f"{server.url}/0.tar")
    deadline = time.monotonic() + 30
    while not server.asked and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert files(cache) == [".part"]
    started = time.monotonic()
    fetched = fetch(cache, f"{server.url}/0.tar")
    assert fetched.path.read_bytes() == shards[0] and not fetched.hit
    assert time.monotonic() - started < 20 and files(cache) == [".json", ".tar"]
