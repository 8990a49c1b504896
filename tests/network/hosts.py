"""Several hosts on one machine: network namespaces with addresses of their own, joined by a switch whose cables can be cut.

The namespaces have no names: each lives in a process that ends when its standard input does, so also when a test is
killed with -9. Links live and die with them; nothing of this is seen outside.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENDING = 10.0  # seconds; a killed process in a slow machine's last collective is gone by then


class Host:
    """A network namespace: what runs in it sees ``lo`` and ``eth0``, and no other network.

    Attributes:
        name: ``host0``, ...
        address: IPv4 address of its eth0.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        # cat tells that it is in its namespace by giving back what it reads.
        self._holder = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._holder.stdin.write(b"!")
        self._holder.stdin.flush()
        if self._holder.stdout.read(1) != b"!":
            raise OSError(f"{name}: no namespace")
        self.pid = self._holder.pid

    def inside(self, *command: str) -> list[str]:
        """``command`` in this namespace; the process id is that of the command."""
        return ["nsenter", "--net", f"--target={self.pid}", "--", *command]

    def run(self, *command: str) -> str:
        """Run ``command`` in here and return what it says on stdout."""
        done = subprocess.run(self.inside(*command), capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{self.name}: {' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
        """Start ``command`` in here, as the leader of a session; it is killed with this host at the latest."""
        return subprocess.Popen(self.inside(*command), env=env, text=True, start_new_session=True, **options)

    def processes(self) -> list[int]:
        """Process ids of all that runs in here."""
        here = os.stat(f"/proc/{self.pid}/ns/net").st_ino
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if (entry / "ns/net").stat().st_ino == here and int(entry.name) != self.pid:
                    found.append(int(entry.name))
        return found

    def close(self) -> None:
        """Kill all that runs in here, and with it the namespace and its links."""
        deadline = time.monotonic() + ENDING
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                # What has ended and was not waited for by the test that started it is no longer in a namespace.
                raise OSError(f"{self.name}: processes {left} do not end")
            time.sleep(0.02)
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait()


class Network:
    """Hosts on one switch, 10.77.0.1 and up. A cable is the switch's end of a host's link."""

    def __init__(self, hosts: Sequence[Host], switch: Host) -> None:
        self.hosts, self._switch = list(hosts), switch
        switch.run("ip", "link", "add", "bridge", "type", "bridge")
        switch.run("ip", "link", "set", "bridge", "up")
        for host in hosts:
            port = ["ip", "link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
            switch.run(*port)
            switch.run("ip", "link", "set", host.name, "master", "bridge", "up")
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")

    def cut(self, host: Host) -> None:
        """Pull the cable of ``host``: packets are lost, connections stay and do not know it."""
        self._switch.run("ip", "link", "set", host.name, "down")

    def restore(self, host: Host) -> None:
        """Plug it in again."""
        self._switch.run("ip", "link", "set", host.name, "up")

    def limit(self, host: Host, megabits: float) -> None:
        """Let through ``megabits`` per second to ``host``, and no more.

        A rate and no delay: the token bucket is part of every kernel, netem of few on machines for tests.
        """
        bits = int(megabits * 1e6)
        # A burst of 10 ms, at least a packet; who sends faster than that waits in a queue of up to a second.
        burst, queue = max(bits // 800, 3200), max(bits // 8, 100_000)
        shaping = ["root", "tbf", "rate", f"{bits}bit", "burst", str(burst), "limit", str(queue)]
        self._switch.run("tc", "qdisc", "replace", "dev", host.name, *shaping)

    def unlimit(self, host: Host) -> None:
        """Full speed again."""
        self._switch.run("tc", "qdisc", "del", "dev", host.name, "root")

    def sent_to(self, host: Host) -> int:
        """Bytes that the switch has sent to ``host``."""
        for line in self._switch.run("cat", "/proc/net/dev").splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == host.name:
                return int(counts.split()[8])
        raise AssertionError(f"{host.name} has no port")


@contextmanager
def network(count: int) -> Iterator[Network]:
    """A network of ``count`` hosts; on the way out nothing of it is left.

    Raises:
        OSError: this machine does not allow it, and why.
    """
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(contextlib.closing(Host("switch", "")))
        names = [(f"host{number}", f"10.77.0.{number + 1}") for number in range(count)]
        yield Network([stack.enter_context(contextlib.closing(Host(*name))) for name in names], switch)
