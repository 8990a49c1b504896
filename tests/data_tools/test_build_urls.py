"""`megamoe data build` from URLs, against a real server that fails in the ways that the web does."""

from __future__ import annotations

import csv
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.sources.download import AGENT, Downloader, DownloadOptions, is_disallowed
from data_tools.sources.item import Loss
from megamoe.core.errors import UserError
from tests.data.shard_factory import jpeg
from tests.data_tools.build_kit import build, members, metadata, rows, shard_bytes, stats
from tests.data_tools.image_server import ImageServer, serving


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with serving() as server:
        yield server


def urls(path: Path, server: ImageServer, names: list[str]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["URL", "TEXT", "punsafe"])
        writer.writerows((f"{server.url}/{name}" if "://" not in name else name, f"about {name}", 0.25) for name in names)
    return path


QUICK = ("--private-hosts", "--timeout", "0.4", "--retries", "1")


def test_pictures_come_in_order_with_their_columns(tmp_path: Path, server: ImageServer) -> None:
    names = [f"good/{n}.jpg" for n in range(25)]
    result = build(urls(tmp_path / "t.csv", server, names), tmp_path / "out", "--shard-size", 10, *QUICK)
    assert result.exit_code == 0 and "25 samples in 3 shards\n" in result.output
    found = metadata(tmp_path / "out")
    assert [row["url"] for row in found] == [f"{server.url}/{name}" for name in names]
    assert found[7]["caption"] == "about good/7.jpg" and found[7]["punsafe"] == 0.25 and "URL" not in found[7]
    assert members(tmp_path / "out")["000024.jpg"] == jpeg(24)
    assert all(agent.startswith(f"{AGENT}/") for agent in server.agents)


def test_each_failure_has_its_cause_and_its_row(tmp_path: Path, server: ImageServer) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{closed.getsockname()[1]}/x.jpg"
    expected = {
        "good/1.jpg": "success",
        "flaky/x.jpg": "success",
        "moved/x.jpg": "success",
        "othernoai/x.jpg": "success",
        "chunked/x.jpg": "success",
        "missing/x.jpg": "HTTP 404",
        "hang/x.jpg": "timed out",
        "drip/x.jpg": "timed out",
        "cut/x.jpg": "connection broken",
        "garbage/x.jpg": "connection broken",
        "noai/x.jpg": "X-Robots-Tag says no",
        "html/x.jpg": "image: not a JPEG, PNG or WebP",
        "huge/x.jpg": "too many bytes",
        "endless/x.jpg": "too many bytes",
        "loop/x.jpg": "too many redirects",
        "file/x.jpg": "not an http(s) URL",
        "file:///etc/passwd": "not an http(s) URL",
        "http://[::bad/x": "not an http(s) URL",
        "http://nowhere.invalid/x.jpg": "host not found",
        refused: "no connection",
    }
    source = urls(tmp_path / "t.csv", server, list(expected))
    result = build(source, tmp_path / "out", *QUICK, "--max-bytes", 100_000)
    assert result.exit_code == 0  # losses are normal here, but
    assert "5 samples in 1 shard; 15 of 20 lost" in result.output
    (totals,) = stats(tmp_path / "out")
    causes = {cause: list(expected.values()).count(cause) for cause in expected.values()}
    assert totals["status_dict"] == causes
    kinds = ("count", "successes", "failed_to_download", "failed_to_resize", "no_caption")
    assert [totals[kind] for kind in kinds] == [20, 5, 14, 1, 0]
    for (name, cause), row in zip(expected.items(), rows(tmp_path / "out"), strict=True):
        assert row["caption"] == f"about {name}" and (cause == "success") == (row["status"] == "success")
        assert row["error_message"] is None or cause.split(" (")[0] in row["error_message"]
    asked = {name: server.asked[f"/{name}"] for name in expected}
    assert (asked["missing/x.jpg"], asked["flaky/x.jpg"], asked["hang/x.jpg"]) == (1, 2, 2)
    assert build(source, tmp_path / "out", *QUICK, "--max-bytes", 100_000, "--max-lost", 0.5).exit_code == 1
    assert server.asked["/good/1.jpg"] == 1  # the shard was there


def test_what_failed_is_asked_for_again_when_asked_and_nothing_else(tmp_path: Path, server: ImageServer) -> None:
    names = [
        "good/1.jpg",
        "flaky/x.jpg",
        "noai/x.jpg",
        "html/x.jpg",
        "good/2.jpg",
        "missing/x.jpg",
        "good/3.jpg",
        "good/4.jpg",
    ]
    source, out = urls(tmp_path / "t.csv", server, names), tmp_path / "out"
    once = ("--private-hosts", "--timeout", "0.4", "--retries", "0", "--shard-size", 4)
    assert build(source, out, *once).exit_code == 0
    before, asked = members(out), dict(server.asked)
    assert "000001.jpg" not in before
    assert build(source, out, *once).exit_code == 0 and server.asked == asked  # finished shards are left alone
    result = build(source, out, *once, "--retry-failed", "--json")
    assert result.exit_code == 0
    again = {name: server.asked[f"/{name}"] - asked[f"/{name}"] for name in names}
    assert again == dict.fromkeys(names, 0) | {"flaky/x.jpg": 1, "missing/x.jpg": 1}
    found = members(out)
    assert found["000001.jpg"] == jpeg(1) and {name: found[name] for name in before} == before
    totals = json.loads(result.stdout)
    causes = {"success": 5, "X-Robots-Tag says no": 1, "image: not a JPEG, PNG or WebP": 1, "HTTP 404": 1}
    assert (totals["successes"], totals["status_dict"]) == (5, causes)
    (tmp_path / "all").mkdir()
    assert build(source, tmp_path / "all", *once).exit_code == 0  # the same from the beginning, now that all is well
    assert rows(out) == rows(tmp_path / "all") and members(tmp_path / "all") == found
    done = {name: content for name, content in shard_bytes(out).items() if name.startswith("00001")}
    assert done.keys() == {"00001.tar", "00001.parquet"}


def test_to_retry_what_is_never_downloaded_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(jpeg(1))
    (tmp_path / "in/a.txt").write_text("a")
    result = build(tmp_path / "in", tmp_path / "out", "--retry-failed")
    assert isinstance(result.exception, UserError) and "--retry-failed: nothing is downloaded for" in str(result.exception)


def test_nothing_at_all_is_a_failure_and_leaves_no_empty_tar(tmp_path: Path, server: ImageServer) -> None:
    source = urls(tmp_path / "t.csv", server, ["missing/1.jpg", "good/1.jpg"])
    assert build(source, tmp_path / "out", "--shard-size", 1, *QUICK).exit_code == 0
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00001.tar"]
    source = urls(tmp_path / "u.csv", server, ["missing/1.jpg"])
    assert build(source, tmp_path / "none", *QUICK).exit_code == 1


def test_a_server_that_asks_for_patience_is_waited_for(server: ImageServer) -> None:
    downloader = Downloader(DownloadOptions(private_hosts=True, retries=1))
    assert downloader.get(f"{server.url}/patient/x.jpg") == jpeg(1)


def test_a_host_is_never_asked_for_more_at_a_time_than_allowed(tmp_path: Path, server: ImageServer) -> None:
    source = urls(tmp_path / "t.csv", server, [f"slow/{n}.jpg" for n in range(30)])
    options = ("--per-host", 3, "--threads", 16, "--shard-size", 15)
    assert build(source, tmp_path / "out", *QUICK, *options).exit_code == 0
    assert server.busiest == 3
    refused = build(source, tmp_path / "more", *QUICK, *options, "--processes", 4)
    assert isinstance(refused.exception, UserError) and "more than --per-host 3" in str(refused.exception)


def test_two_processes_download_what_one_does(tmp_path: Path, server: ImageServer) -> None:
    source = urls(tmp_path / "t.csv", server, [f"good/{n}.jpg" for n in range(30)])
    for processes in (1, 2):
        options = ("--processes", processes, "--shard-size", 10)
        assert build(source, tmp_path / str(processes), *QUICK, *options).exit_code == 0
    assert shard_bytes(tmp_path / "1") == shard_bytes(tmp_path / "2")


def test_addresses_inside_the_cluster_are_not_asked(tmp_path: Path, server: ImageServer) -> None:
    source = urls(tmp_path / "t.csv", server, ["good/1.jpg", f"http://localhost:{server.server_port}/good/2.jpg"])
    assert build(source, tmp_path / "out").exit_code == 1
    assert [row["status"] for row in rows(tmp_path / "out")] == ["failed_to_download"] * 2
    assert "127.0.0.1: not on the public net (--private-hosts allows it)" in rows(tmp_path / "out")[0]["error_message"]
    assert not server.asked


def test_a_proxy_of_the_environment_is_used(server: ImageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "direct.invalid")
    with pytest.raises(Loss, match="HTTP 404"):
        Downloader(DownloadOptions(retries=0)).get("http://nowhere.invalid/x.jpg")
    assert server.asked == {"http://nowhere.invalid/x.jpg": 1}
    with pytest.raises(Loss, match="host not found"):
        Downloader(DownloadOptions(retries=0)).get("http://direct.invalid/x.jpg")


def test_what_robots_tags_mean() -> None:
    words = ("noai", "noindex")
    assert is_disallowed(["noai"], words) and is_disallowed(["all", "nofollow,  NOINDEX"], words)
    assert is_disallowed([f"{AGENT}: noai"], words) and not is_disallowed(["otherbot: noai"], words)
    assert not is_disallowed(["nofollow"], words) and not is_disallowed([], words) and not is_disallowed(["noai"], ())


def test_the_header_can_be_passed_over_when_asked(tmp_path: Path, server: ImageServer) -> None:
    source = urls(tmp_path / "t.csv", server, ["noai/x.jpg"])
    assert build(source, tmp_path / "a", *QUICK).exit_code == 1
    assert build(source, tmp_path / "b", *QUICK, "--disallowed-header-directives", "").exit_code == 0


def test_a_list_of_urls_makes_pictures_without_captions_when_asked(tmp_path: Path, server: ImageServer) -> None:
    (tmp_path / "l.txt").write_text("".join(f"{server.url}/good/{n}.jpg\n\n" for n in range(3)))
    assert "a list of URLs has no captions" in str(build(tmp_path / "l.txt", tmp_path / "out", *QUICK).exception)
    result = build(tmp_path / "l.txt", tmp_path / "out", *QUICK, "--captions-optional", "--json")
    assert json.loads(result.stdout)["successes"] == 3
    assert sorted(members(tmp_path / "out")) == sorted(f"0000{n:05d}.{ext}" for n in range(3) for ext in ("jpg", "json"))
