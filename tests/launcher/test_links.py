"""Who is to blame for bad links: made-up reports, and meetings of real processes' sockets."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.health.collective import partners
from launcher.health.connections import Met, meet
from launcher.health.links import GBIT, Links, link_problems
from launcher.workers.processes import free_port
from megamoe.config.launch import HealthConfig


def links(nodes: int, slow: dict[tuple[int, int], float], usual: float = 10.0) -> Links:
    return Links([], [], 1e9, [(*pair, slow.get(pair, usual) * GBIT) for pair in combinations(range(nodes), 2)])


def judged(links: Links, nodes: int, **health: float) -> tuple[list[str], list[str]]:
    names = [f"n{number}" for number in range(nodes)]
    problems, told = link_problems(links, names, HealthConfig.model_validate(health))
    return [str(problem) for problem in problems], told


def test_a_node_that_is_slow_with_all_others_is_named_with_its_speeds() -> None:
    for nodes in (3, 4, 8):
        slow = {(node, 1) if node < 1 else (1, node): 1.0 for node in range(nodes) if node != 1}
        (line,), told = judged(links(nodes, slow), nodes)
        assert line.startswith("n1: links: 1 Gbit/s with n0, 1 Gbit/s with n2") and told == []
        assert "the best link has 10 Gbit/s (launch.health.slow 4); look at its network card" in line


def test_a_single_slow_link_is_told_and_both_its_nodes_are_used() -> None:
    bad, told = judged(links(4, {(1, 3): 0.1}), 4)
    assert bad == [] and told == ["the link of n1 and n3 is slow: 0.1 Gbit/s (launch.health.slow 4)"]


def test_two_nodes_alone_are_held_against_a_bandwidth_only() -> None:
    assert judged(links(2, {}, usual=0.1), 2) == ([], [])
    bad, told = judged(links(2, {}, usual=0.1), 2, bandwidth=1.0)
    assert bad == [] and "n0 and n1 is slow: 0.1 Gbit/s (launch.health.slow 4 or launch.health.bandwidth 1)" in told[0]


def test_slow_links_between_two_halves_are_the_network_and_no_node_is_blamed() -> None:
    slow = {(one, other): 1.0 for one in range(4) for other in range(4, 8)}
    bad, told = judged(links(8, slow), 8)
    assert bad == [] and len(told) == 16


def test_links_that_differ_by_less_than_the_factor_are_no_problem() -> None:
    assert judged(links(4, {(0, 1): 3.0, (0, 2): 3.0, (0, 3): 3.0}), 4) == ([], [])
    assert judged(links(4, {(0, 1): 0.1, (0, 2): 0.1, (0, 3): 0.1}), 4, slow=0) == ([], [])


def test_who_cannot_connect_has_to_go_and_as_few_as_explain_it() -> None:
    (line,), _ = judged(Links([], [(0, 2), (1, 2), (2, 3)], 0, []), 4)
    assert line.startswith("n2: links: no connection with n0, n1, n3, every pair of nodes is needed; look for a firewall")
    (line,), _ = judged(Links([], [(1, 2)], 0, []), 4)
    assert line.startswith("n2: ")  # one of the two: the later


def test_a_node_that_does_not_come_is_named_and_the_first_when_nobody_comes() -> None:
    (line,), _ = judged(Links([2], [], 0, []), 4)
    assert line.startswith("n2: rendezvous: does not reach n0, every node has to; look for a firewall")
    (line,), _ = judged(Links([1, 2, 3], [], 0, []), 4)
    assert line.startswith("n0: rendezvous port: no other node reaches it")
    (line,), _ = judged(Links([1], [], 0, []), 2)
    assert line.startswith("n1: ")


@pytest.mark.parametrize("message", [{}, {"missing": [9]}, {"unreachable": [[0, 0]]}, {"speeds": [[0, 1, "fast"]]}])
def test_a_report_that_is_none_is_refused(message: dict[str, object]) -> None:
    whole: dict[str, object] = {"missing": [], "unreachable": [], "all_reduce": 1.0, "speeds": []}
    assert Links.from_json(whole, 2) == Links([], [], 1.0, [])
    with pytest.raises(ValueError, match="report"):
        Links.from_json({**whole, **message} if message else {}, 2)


@given(st.integers(2, 40), st.integers(1, 9))
def test_in_each_round_each_node_has_another_partner(nodes: int, rounds: int) -> None:
    found = partners(nodes, rounds)
    pairs = [pair for one in found for pair in one]
    assert len(set(pairs)) == len(pairs) and all(0 <= one < other < nodes for one, other in pairs)
    assert len(found) == min(rounds, nodes - 1 + nodes % 2)
    for one in found:
        assert len({node for pair in one for node in pair}) == 2 * len(one) == nodes - nodes % 2


def knock(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.01)


def test_all_meet_while_strangers_knock_on_the_port() -> None:
    port = free_port()
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(meet, 0, 4, "127.0.0.1", port, 20.0)
        others = [pool.submit(meet, 1, 4, "127.0.0.1", port, 20.0)]
        with knock(port) as stranger:
            stranger.sendall(b'GET / HTTP/1.1\r\n\r\n{"rank": "all"}\n')
            others += [pool.submit(meet, rank, 4, "127.0.0.1", port, 20.0) for rank in (2, 3)]
            assert first.result() == Met([], [])
        assert [other.result() for other in others] == [None, None, None]


def test_who_does_not_come_is_missing_after_the_time_given() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, 0, 3, "127.0.0.1", port, 1.0)
        assert pool.submit(meet, 1, 3, "127.0.0.1", port, 1.0).result() is None
        assert first.result() == Met([2], [])
