"""Bad hosts are found before ranks start on them: real agents, meetings and collectives, with a stand-in for the ranks."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.launcher.test_local import WORKER
from tests.network.conftest import supervised
from tests.network.hosts import Network, network
from tests.training import small_config, write_config

DONE = [sys.executable, str(WORKER), json.dumps({})]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The folder of a config of three nodes."""
    write_config(tmp_path, small_config(train={"global_batch": 12}, launch={"nodes": 3}))
    return tmp_path


def test_a_host_with_a_slow_link_is_excluded_and_named_with_its_speeds(three: Network, config: Path) -> None:
    three.limit(three.hosts[1], megabits=20)
    with supervised(three.hosts, config, "slow", command=DONE) as run:
        status, said = run.end()
    assert status == 0, said
    (excluded,) = run.events("excluded")
    assert excluded["node"] == "n2" and (run.folder / "excluded").read_text() == "n2\n"
    assert "Gbit/s with n1, " in excluded["detail"]["why"] and "launch.health.slow 4" in excluded["detail"]["why"]
    assert "node n2 is not used any more: n2: links: 0.0" in said
    assert [each["detail"]["nodes"] for each in run.events("attempt")] == [["n1", "n3"]]
    assert len(run.events("measured")) == 1  # the two that are left have been measured with each other


def test_a_host_that_cannot_connect_with_another_is_excluded_and_named(three: Network, config: Path) -> None:
    three.hosts[1].run("ip", "route", "add", "blackhole", f"{three.hosts[2].address}/32")
    with supervised(three.hosts, config, "apart", command=DONE) as run:
        status, said = run.end()
    assert status == 0, said
    (excluded,) = run.events("excluded")
    assert excluded["node"] == "n3" and "no connection with n2" in excluded["detail"]["why"]
    assert [each["detail"]["nodes"] for each in run.events("attempt")] == [["n1", "n2"]]
    assert [each["detail"]["nodes"] for each in run.events("measured")] == [["n1", "n2"]]


def test_nothing_of_a_network_is_left_behind(two: Network) -> None:
    links = Path("/proc/net/dev").read_text().count(":")
    with pytest.raises(ZeroDivisionError), network(2) as made:
        process = made.hosts[0].start(["sleep", "600"])
        until = time.monotonic() + 30
        while made.hosts[0].processes() != [process.pid]:  # it enters the host's network after it has started
            assert time.monotonic() < until
            time.sleep(0.05)
        holders = [host.pid for host in made.hosts]
        raise ZeroDivisionError
    assert process.wait() < 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in holders)
    assert Path("/proc/net/dev").read_text().count(":") == links
