"""Shards from a real S3 server: moto's, over the network, through s3fs."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from megamoe.core.errors import DataError
from megamoe.data.remote.cache import ShardCache
from megamoe.data.remote.download import ShardUnavailable, download
from megamoe.data.remote.stream import Patience
from megamoe.data.shards.expand import expand_shards
from tests.data.test_cache import fetch

s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
boto3 = pytest.importorskip("boto3", reason="needs moto[server]")
moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")

QUICK = Patience(tries=2, first_wait=0.01)
SHARD = bytes(range(256)) * 80_000  # 20 MB, three requests


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """Make a client for a server with a bucket ``laion``; the environment names the server, as for users."""
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    s3fs.S3FileSystem.clear_instance_cache()  # it remembers the server of another test
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="laion")
        for name in ("train/00001.tar", "train/00000.tar", "train/00001.tar.idx", "train/below/00009.tar", "notes.txt"):
            client.put_object(Bucket="laion", Key=name, Body=SHARD if name.endswith("0.tar") else b"small")
        yield client
        server.stop()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("s3://laion/train/", ["00000.tar", "00001.tar"]),
        ("s3://laion/train/*", ["00000.tar", "00001.tar"]),
        ("s3://laion/tr*/{0000[01],below/*}.tar", ["00000.tar", "00001.tar", "below/00009.tar"]),
        ("s3://laion/train/{00000..00001}.tar", ["00000.tar", "00001.tar"]),
    ],
)
def test_shards_are_listed(store: Any, spec: str, expected: list[str]) -> None:
    assert expand_shards([spec]) == [f"s3://laion/train/{name}" for name in expected]


@pytest.mark.parametrize("spec", ["s3://laion/nothing/", "s3://laion/*.gz", "s3://no-such-bucket/train/"])
def test_nothing_found_is_one_line(store: Any, spec: str) -> None:
    with pytest.raises(DataError, match="check the bucket") as raised:
        expand_shards([spec])
    assert "\n" not in str(raised.value)


def test_a_shard_comes_whole_and_is_known_by_its_etag(store: Any, tmp_path: Path) -> None:
    fetched = fetch(ShardCache(tmp_path, None, QUICK), "s3://laion/train/00000.tar")
    assert fetched.path.read_bytes() == SHARD
    etag = store.head_object(Bucket="laion", Key="train/00000.tar")["ETag"]
    assert fetched.identity == f"{etag};{len(SHARD)}" and fetched.received == len(SHARD)


@pytest.mark.parametrize("name", ["s3://laion/train/none.tar", "s3://no-such-bucket/a.tar"])
def test_a_missing_object_fails_at_once(store: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(ShardUnavailable, match=r"1 try \(no such object\); check the name"):
        fetch(ShardCache(tmp_path, None, QUICK), name)


def test_a_folder_is_no_shard(store: Any, tmp_path: Path) -> None:
    with pytest.raises(ShardUnavailable, match=r"it is a folder\); end its name in /"):
        fetch(ShardCache(tmp_path, None, QUICK), "s3://laion/train")


def test_an_object_replaced_while_it_is_read_never_mixes(store: Any, tmp_path: Path) -> None:
    other = SHARD[::-1]
    store.put_object(Bucket="laion", Key="moving.tar", Body=SHARD)

    class Part:
        """A file, during whose first write the object is replaced."""

        def __init__(self, file: Any) -> None:
            self.file, self.done = file, False

        def write(self, data: bytes) -> int:
            if not self.done:
                store.put_object(Bucket="laion", Key="moving.tar", Body=other)
                self.done = True
            return int(self.file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with open(tmp_path / "part", "w+b") as file:
        done = download("s3://laion/moving.tar", Part(file), QUICK)  # type: ignore[arg-type]
        file.seek(0)
        assert file.read() == other
    assert done.retries == 1


@pytest.mark.parametrize(
    ("status", "line"),
    [(403, r"1 try \(access denied: .*\); check the credentials"), (503, r"2 tries \(.*\); check that its source is up")],
)
def test_a_store_that_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, line: str) -> None:
    class Refuse(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuse) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hidden")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            with pytest.raises(ShardUnavailable, match=line) as raised:
                fetch(ShardCache(tmp_path, None, QUICK), "s3://laion/train/00000.tar")
        finally:
            server.shutdown()
            s3fs.S3FileSystem.clear_instance_cache()
    assert "\n" not in str(raised.value) and "hidden" not in str(raised.value)
