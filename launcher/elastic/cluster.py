"""The interface to whoever gives out nodes (SLURM, or local processes in tests), and a queue of requests to it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from launcher.workers.output import Terminal


class Cluster(Protocol):
    """Gives nodes, takes wishes for more, and starts the run again later.

    Agents come to the supervisor by themselves, with what RUN/launch/supervisor.json tells them; the cluster only has to
    start them. Methods are called one after the other. ``nodes_present``, ``ask_for_nodes`` and ``exclude`` are called
    from a thread of their own, so that a slow answer holds nothing up; an exception there is said in the log and changes
    nothing else.

    Attributes:
        job: name of the allocation that the supervisor runs in. Agents that say the same job belong to it: when one of
            them is told to stop, the whole run is. Agents of other jobs only take their own node away.
    """

    job: str

    def start_agents(self) -> int:
        """Start one agent on each node of this allocation, those that stand by included.

        Returns:
            How many, at once and not when they run; the first attempt waits for that number.
        """
        ...

    def nodes_present(self, nodes: Collection[str]) -> None:
        """Take note of the nodes whose agents the supervisor has now. Called whenever they change, before any wish."""
        ...

    def ask_for_nodes(self, count: int) -> None:
        """Bring ``count`` further agents if possible, on nodes of this allocation that have none or by a further job.

        Replaces an earlier wish, also one that was fulfilled in part; 0 cancels it.
        """
        ...

    def run_again(self, why: str) -> bool:
        """Start the whole run again later. All agents have been dismissed by then.

        Returns:
            False when the site or a setting forbids it.
        """
        ...

    def exclude(self, node: str, why: str) -> None:
        """Never use a bad node again in this run, also when the run is started again."""
        ...

    def close(self) -> None:
        """End the agents of this allocation and cancel wishes; the last call."""
        ...


class Wishes:
    """Asks the cluster from a thread of its own, since an answer may take many seconds while ranks are at work.

    Use as a context manager: on the way out all that was asked has been done.
    """

    def __init__(self, cluster: Cluster, terminal: Terminal) -> None:
        self._cluster, self._terminal = cluster, terminal
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cluster")
        self._wanted = 0
        self._present: frozenset[str] = frozenset()

    def __enter__(self) -> Wishes:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def present(self, nodes: Collection[str]) -> None:
        """Tell the cluster which nodes have come."""
        names = frozenset(nodes)
        if names != self._present:
            self._present = names
            self._thread.submit(self._try, "told of its nodes", lambda: self._cluster.nodes_present(names))

    def nodes(self, count: int) -> None:
        """Ask for so many further nodes."""
        if count != self._wanted:
            self._wanted = count
            self._thread.submit(self._try, "asked for nodes", lambda: self._cluster.ask_for_nodes(count))

    def exclude(self, node: str, why: str) -> None:
        """Ask never to get this node again."""
        self._thread.submit(self._try, f"told to exclude {node}", lambda: self._cluster.exclude(node, why))

    def _try(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, the run goes on with the nodes that it has
            self._terminal.say(f"the cluster, {what}, failed: {error}")
