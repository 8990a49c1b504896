"""What is asked of the cluster while ranks are at work: from a thread, since its answer may take many seconds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from launcher.elastic.cluster import Cluster
from launcher.workers.output import Terminal


class Wishes:
    """Use as a context manager: on the way out all that was asked has been done."""

    def __init__(self, cluster: Cluster, terminal: Terminal) -> None:
        self._cluster, self._terminal = cluster, terminal
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cluster")
        self._nodes = 0

    def __enter__(self) -> Wishes:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def nodes(self, count: int) -> None:
        """Wish for so many further nodes."""
        if count != self._nodes:
            self._nodes = count
            self._thread.submit(self._try, "asked for nodes", lambda: self._cluster.ask_for_nodes(count))

    def exclude(self, node: str, why: str) -> None:
        """Wish never to see this node again."""
        self._thread.submit(self._try, f"told to exclude {node}", lambda: self._cluster.exclude(node, why))

    def _try(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, the run goes on with the nodes that it has
            self._terminal.say(f"the cluster, {what}, failed: {error}")
