"""Downloads from real servers that break: one whole shard, or one clear line."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from megamoe.core.errors import DataError
from megamoe.core.urls import masked
from megamoe.data.remote.download import Download, ShardUnavailable, download
from megamoe.data.remote.stream import Patience
from tests.data import shard_server
from tests.data.shard_factory import sample, write_tar
from tests.data.shard_server import Handler, ShardServer, serving

QUICK = Patience(connect=2, read=0.5, slowest=1000, tries=3, first_wait=0.01, longest_wait=0.3)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = write_tar(tmp_path_factory.mktemp("shard") / "0.tar", [member for n in range(40) for member in sample(n)])
    return path.read_bytes()


@pytest.fixture
def server(shard: bytes) -> Iterator[ShardServer]:
    with serving() as server:
        server.objects["/00000.tar"] = shard
        yield server


@pytest.fixture
def file(tmp_path: Path) -> Iterator[BinaryIO]:
    with open(tmp_path / "part", "w+b") as file:
        yield file


def content(file: BinaryIO) -> bytes:
    file.flush()
    file.seek(0)
    return file.read()


def ranges(server: ShardServer) -> list[str | None]:
    return [asked for _, asked in server.asked]


def test_a_shard_comes_whole_in_one_request(server: ShardServer, shard: bytes, file: BinaryIO) -> None:
    done = download(f"{server.url}/00000.tar", file, QUICK)
    assert content(file) == shard
    assert done == Download(len(shard), shard_server.etag(shard), len(shard), 0)
    assert ranges(server) == [None]


@pytest.mark.parametrize("cut", [shard_server.cut_after, shard_server.closed_after])
def test_a_cut_stream_goes_on_at_its_byte(server: ShardServer, shard: bytes, file: BinaryIO, cut: Any) -> None:
    server.answers["/00000.tar"] = [cut(10_000), cut(5_000)]
    done = download(f"{server.url}/00000.tar", file, QUICK)
    assert content(file) == shard
    assert (done.received, done.retries) == (len(shard), 2)
    assert ranges(server) == [None, "bytes=10000-", "bytes=15000-"]


def test_a_stream_cut_again_and_again_without_progress_fails(server: ShardServer, file: BinaryIO) -> None:
    server.answers["/00000.tar"] = [shard_server.cut_after(100)] * 9
    with pytest.raises(ShardUnavailable, match=r"00000.tar: cannot be had, 3 tries \(.*\); check that its source is up"):
        download(f"{server.url}/00000.tar", file, QUICK)
    assert len(server.asked) == 3


def test_a_stream_that_gets_on_may_break_more_often_than_there_are_tries(server: ShardServer, file: BinaryIO) -> None:
    large = os.urandom(8 << 20)
    server.objects["/large.tar"] = large
    server.answers["/large.tar"] = [shard_server.cut_after(1_200_000)] * 6
    assert download(f"{server.url}/large.tar", file, QUICK).retries == 6
    assert content(file) == large


def test_without_ranges_it_begins_anew(server: ShardServer, shard: bytes, file: BinaryIO) -> None:
    server.answers["/00000.tar"] = [shard_server.without_range(9_000), shard_server.without_range()]
    done = download(f"{server.url}/00000.tar", file, QUICK)
    assert content(file) == shard
    assert done == Download(len(shard), None, len(shard) + 9_000, 1)
    assert ranges(server) == [None, None]


def test_a_cut_that_no_length_shows_is_seen_by_the_end_of_the_tar(
    server: ShardServer, shard: bytes, file: BinaryIO
) -> None:
    server.answers["/00000.tar"] = [shard_server.without_length(20_000), shard_server.without_length()]
    assert download(f"{server.url}/00000.tar", file, QUICK).retries == 1
    assert content(file) == shard
    server.answers["/00000.tar"] = [shard_server.without_length(20_000)] * 3
    with pytest.raises(ShardUnavailable, match="broken off after 20000 bytes, without the end mark of a tar"):
        download(f"{server.url}/00000.tar", file, QUICK)


def test_a_page_without_length_is_left_to_the_tar_reader(server: ShardServer, file: BinaryIO) -> None:
    server.objects["/page.tar"] = b"<html>please log in</html>"
    server.answers["/page.tar"] = [shard_server.without_length()]
    download(f"{server.url}/page.tar", file, QUICK)
    assert content(file) == b"<html>please log in</html>"


def test_chunks_cut_in_the_middle_are_a_failure(server: ShardServer, shard: bytes, file: BinaryIO) -> None:
    def chunked(handler: Handler, body: bytes) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.begin(200, Transfer_Encoding="chunked", Connection="close")
        handler.wfile.write(b"%x\r\n%b\r\n" % (7_000, body[:7_000]))
        handler.wfile.write(b"%x\r\n%b" % (len(body) - 7_000, body[7_000:8_000]))

    server.answers["/00000.tar"] = [chunked]
    assert download(f"{server.url}/00000.tar", file, QUICK).retries == 1
    assert content(file) == shard


def test_an_object_replaced_between_two_ranges_never_mixes(server: ShardServer, shard: bytes, file: BinaryIO) -> None:
    def replace(handler: Handler, body: bytes) -> None:
        shard_server.cut_after(10_000)(handler, body)
        server.objects["/00000.tar"] = shard[::-1]

    server.answers["/00000.tar"] = [replace]
    done = download(f"{server.url}/00000.tar", file, QUICK)
    assert content(file) == shard[::-1]
    assert done.identity == shard_server.etag(shard[::-1])
    assert ranges(server) == [None, "bytes=10000-"]


def test_a_range_of_another_object_is_not_taken(server: ShardServer, shard: bytes, file: BinaryIO) -> None:
    def careless(handler: Handler, body: bytes) -> None:  # sends the range although If-Range does not hold
        other, start = shard[::-1], 10_000
        span = f"bytes {start}-{len(other) - 1}/{len(other)}"
        handler.begin(206, Content_Range=span, Content_Length=len(other) - start, ETag='"other"')
        handler.wfile.write(other[start:])

    server.answers["/00000.tar"] = [shard_server.cut_after(10_000), careless]
    download(f"{server.url}/00000.tar", file, QUICK)
    assert content(file) == shard
    assert ranges(server) == [None, "bytes=10000-", None]


def test_an_object_that_keeps_changing_fails(server: ShardServer, file: BinaryIO) -> None:
    def change(handler: Handler, body: bytes) -> None:
        server.objects["/00000.tar"] = os.urandom(len(body))
        shard_server.cut_after(10_000)(handler, server.objects["/00000.tar"])

    server.answers["/00000.tar"] = [change] * 9
    with pytest.raises(ShardUnavailable, match="3 tries"):
        download(f"{server.url}/00000.tar", file, QUICK)


def test_date_and_length_prove_sameness_where_there_is_no_etag(server: ShardServer, shard: bytes, file: BinaryIO) -> None:
    date = formatdate(1_700_000_000, usegmt=True)
    conditions: list[str | None] = []

    def dated(handler: Handler, body: bytes) -> None:
        conditions.append(handler.headers["If-Range"])
        if not handler.headers["Range"]:
            handler.begin(200, Content_Length=len(body), Last_Modified=date, ETag='W/"weak"')
            handler.wfile.write(body[:3_000])
            return
        span = f"bytes 3000-{len(body) - 1}/{len(body)}"
        handler.begin(206, Content_Range=span, Content_Length=len(body) - 3_000, Last_Modified=date)
        handler.wfile.write(body[3_000:])

    server.answers["/00000.tar"] = [dated, dated]
    done = download(f"{server.url}/00000.tar", file, QUICK)
    assert content(file) == shard
    assert done.identity == f"{date};{len(shard)}"
    assert conditions == [None, date]


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_what_passes_is_waited_for(server: ShardServer, shard: bytes, file: BinaryIO, code: int) -> None:
    server.answers["/00000.tar"] = [shard_server.status(code)]
    assert download(f"{server.url}/00000.tar", file, QUICK).retries == 1
    assert content(file) == shard


def test_retry_after_is_respected_within_the_bound(server: ShardServer, file: BinaryIO) -> None:
    server.answers["/00000.tar"] = [shard_server.status(503, Retry_After=3600)]
    started = time.monotonic()
    download(f"{server.url}/00000.tar", file, QUICK)
    assert 0.3 <= time.monotonic() - started < 9


def test_503_for_ever_ends(server: ShardServer, file: BinaryIO) -> None:
    server.answers["/00000.tar"] = [shard_server.status(503)] * 9
    with pytest.raises(ShardUnavailable, match=r"3 tries \(HTTP 503 Service Unavailable\)"):
        download(f"{server.url}/00000.tar", file, QUICK)
    assert len(server.asked) == 3
    assert content(file) == b""


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(401, "credentials"), (403, "sign the URL again"), (404, "check the name"), (410, "check the name")],
)
def test_what_does_not_pass_fails_at_once(server: ShardServer, file: BinaryIO, code: int, remedy: str) -> None:
    server.answers["/00000.tar"] = [shard_server.status(code)]
    with pytest.raises(ShardUnavailable, match=rf"1 try \(HTTP {code} .*\); .*{remedy}"):
        download(f"{server.url}/00000.tar", file, QUICK)
    assert len(server.asked) == 1


@pytest.mark.parametrize("stuck", [shard_server.trickle(6), shard_server.silence(5)])
def test_a_stuck_stream_is_given_up_and_asked_for_again(
    server: ShardServer, shard: bytes, file: BinaryIO, stuck: Any
) -> None:
    server.answers["/00000.tar"] = [stuck]
    started = time.monotonic()
    assert download(f"{server.url}/00000.tar", file, QUICK).retries == 1
    assert content(file) == shard
    assert time.monotonic() - started < 4.5


def test_a_server_that_is_not_there_is_one_line(file: BinaryIO) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.tar"
    with pytest.raises(ShardUnavailable, match=r"3 tries \(Connection refused\)") as raised:
        download(url, file, QUICK)
    assert "\n" not in str(raised.value)


def test_no_secret_is_in_a_message(server: ShardServer, file: BinaryIO) -> None:
    host = server.url.removeprefix("http://")
    server.answers["/00000.tar"] = [shard_server.status(403), shard_server.status(404, Location="x")]
    for url in (f"http://user:hidden@{host}/00000.tar", f"{server.url}/00000.tar?X-Amz-Signature=hidden"):
        with pytest.raises(ShardUnavailable) as raised:
            download(url, file, QUICK)
        assert "hidden" not in str(raised.value) and "00000.tar" in str(raised.value)
    command = "pipe:echo 'curl -H Authorization: Bearer hidden https://u:hidden@h/x?sig=hidden' >&2; exit 1"
    with pytest.raises(ShardUnavailable) as raised:
        download(command, file, QUICK)
    assert "hidden" not in str(raised.value)


def test_an_endless_shard_is_bounded(server: ShardServer, file: BinaryIO) -> None:
    with pytest.raises(DataError, match="10000 are allowed"):
        download(f"{server.url}/00000.tar", file, QUICK, largest=10_000)
    with pytest.raises(DataError, match="10000 are allowed"):
        download("pipe:cat /dev/zero", file, QUICK, largest=10_000)


def test_a_full_disk_is_not_taken_for_a_bad_network(server: ShardServer) -> None:
    with open("/dev/full", "w+b", buffering=0) as full, pytest.raises(OSError) as raised:
        download(f"{server.url}/00000.tar", full, QUICK)
    assert raised.value.errno == errno.ENOSPC and len(server.asked) == 1


def test_a_pipe_is_read_to_its_end(tmp_path: Path, shard: bytes, file: BinaryIO) -> None:
    (tmp_path / "a.tar").write_bytes(shard)
    assert download(f"pipe:cat {tmp_path}/a.tar", file, QUICK) == Download(len(shard), None, len(shard), 0)
    assert content(file) == shard


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("head -c 5000 {}; echo first >&2; echo 'no route' >&2; exit 3", r"3 tries \(.* ended with status 3: no route\)"),
        ("head -c 5000 {}", "broken off after 5000 bytes, without the end mark"),
        ("true", "broken off after 0 bytes"),
        ("no-such-command {}", r"1 try \(.*ended with status 127: .*not found\); check the command"),
        ("cat {}; kill -9 $$", "killed by SIGKILL: it said nothing"),
        ("head -c 5000 {}; sleep 60", "wrote nothing for 0.5 s"),
    ],
)
def test_a_failing_pipe_says_why(tmp_path: Path, shard: bytes, file: BinaryIO, command: str, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(shard)
    with pytest.raises(ShardUnavailable, match=reason) as raised:
        download(f"pipe:{command.replace('{}', str(tmp_path / 'a.tar'))}", file, QUICK)
    assert "\n" not in str(raised.value)


def test_a_pipe_that_is_given_up_leaves_no_process(tmp_path: Path, file: BinaryIO) -> None:
    with pytest.raises(ShardUnavailable):
        download(f"pipe:(echo $$ > {tmp_path}/pid; sleep 60) | cat", file, QUICK)
    process = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the shell is still there")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_store_that_breaks_off_goes_on_at_its_byte_unless_the_object_changed(
    file: BinaryIO, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    store, first, other = fsspec.filesystem("memory"), os.urandom(20 << 20), os.urandom(20 << 20)
    store.pipe("/breaking.tar", first)
    real, reads = MemoryFile.read, []

    def read(self: MemoryFile, size: int = -1) -> bytes:
        reads.append(self.tell())
        if len(reads) == 2:
            if replaced:
                store.pipe("/breaking.tar", other)
            raise ConnectionResetError("reset by peer")
        return bytes(real(self, size))

    monkeypatch.setattr(MemoryFile, "read", read)
    done = download("memory://breaking.tar", file, QUICK)
    assert content(file) == (other if replaced else first)
    assert done.retries == 1 and reads[2] == (0 if replaced else reads[1])


def test_an_object_replaced_without_a_break_is_read_again(file: BinaryIO, monkeypatch: pytest.MonkeyPatch) -> None:
    store, first, other = fsspec.filesystem("memory"), os.urandom(1 << 20), os.urandom(1 << 20)
    store.pipe("/moving.tar", first)
    real, reads = MemoryFile.read, []

    def read(self: MemoryFile, size: int = -1) -> bytes:
        reads.append(self.tell())
        if len(reads) == 1:
            store.pipe("/moving.tar", other)
        return bytes(real(self, size))

    monkeypatch.setattr(MemoryFile, "read", read)
    assert download("memory://moving.tar", file, QUICK).retries == 1
    assert content(file) == other


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@ss@h/a.tar?sig=1", "http://***@h/a.tar?***"),
        ("https://token@h/a.tar", "https://***@h/a.tar"),
        ("s3://key:secret@b/a?.tar", "s3://***@b/a?.tar"),
        ("hf://datasets/o/r@main/a.tar", "hf://datasets/o/r@main/a.tar"),
        ("curl -H 'Authorization: Bearer abc' 'https://h/a?b'", "curl -H 'Authorization: Bearer ***' 'https://h/a?***'"),
        ("AWS_SECRET_ACCESS_KEY=abc aws s3 cp", "AWS_SECRET_ACCESS_KEY=*** aws s3 cp"),
        ("Max retries exceeded with url: /a.tar?sig=abc", "Max retries exceeded with url: /a.tar?***"),
        ("NoSuchKey: The key does not exist", "NoSuchKey: The key does not exist"),
    ],
)
def test_secrets_are_masked_and_names_are_not(text: str, shown: str) -> None:
    assert masked(text) == shown
