"""What the supervisor asks of whoever gives out nodes: SLURM, or local processes in tests."""

from __future__ import annotations

from typing import Protocol


class Cluster(Protocol):
    """Gives nodes, takes wishes for more, and starts the run again later.

    Agents come to the supervisor by themselves, with what RUN/launch/supervisor.json tells them; the cluster only has to
    start them. Methods are called one after the other. ``ask_for_nodes`` and ``exclude`` are called from a thread of
    their own, so that a slow answer holds nothing up; an exception there is said in the log and changes nothing else.

    Attributes:
        job: name of the allocation that the supervisor runs in. Agents that say the same job belong to it: when one of
            them is told to stop, the whole run is. Agents of other jobs only take their own node away.
    """

    job: str

    def start_agents(self) -> int:
        """Start one agent on each node of this allocation, which hold its spares, too.

        Returns:
            How many, at once and not when they run; the first attempt waits for that number.
        """
        ...

    def ask_for_nodes(self, count: int) -> None:
        """Bring ``count`` further agents if possible, on nodes of this allocation that have none or by a further job.

        Replaces an earlier wish, also one that was fulfilled in part; 0 cancels it.
        """
        ...

    def run_again(self, why: str) -> bool:
        """The whole run is to be started again later. All agents have been dismissed by then.

        Returns:
            False when the site or a setting forbids it.
        """
        ...

    def exclude(self, node: str, why: str) -> None:
        """A bad node: never again in this run, also when it is started again."""
        ...

    def close(self) -> None:
        """End the agents of this allocation and cancel wishes; the last call."""
        ...
