"""A real SLURM of several nodes on one machine, for tests: started and stopped as a whole, all of it in one folder.

Each node is a `slurmd` in namespaces of its own. A PID namespace makes the death of a node what it is in reality: the
kernel ends everything on it at once, whatever a job has started and however it has detached. Further the node has its
own host name, its own address (127.x.y.K, known by name on the nodes) and its own /dev/shm. Files are shared by all
nodes, as on a cluster with a parallel file system. CPUs are make-believe, so that small jobs fit on any machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
TOOLS = ("munged", "slurmctld", "slurmd", "srun", "unshare")
START_SECONDS = 60
# Where Debian keeps daemons, which is not in everyone's PATH.
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
# The first process of a node. It stays as the parent of slurmd and so takes in processes that lose their own parent.
# Its own /proc shows the processes of this node only, which is how slurmd finds those of a job.
NODE_START = """
hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs tmpfs /dev/shm || exit 1
slurmd -D -N "$1" &
wait $!
"""


class BedError(Exception):
    """The test bed cannot do what was asked; the text is one line for the user."""


def why_not() -> str | None:
    """Why no test bed can run here, with the remedy; None if it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not found; `slurm/testbed install` installs the packages {' and '.join(PACKAGES)}"
    if os.geteuid() != 0:
        return "daemons of SLURM that start jobs have to run as root; use sudo"
    probe = _tool("unshare", "--pid", "--fork", "--mount", "--uts", "--mount-proc", "hostname", "probe")
    if probe.returncode:
        return (
            f"a node needs its own namespaces, which are refused here ({probe.stderr.strip()}); run outside of a container"
        )
    return None


class Bed:
    """The test bed of one folder, running or not.

    Attributes:
        folder: State, logs, sockets and settings, all of it.
        nodes: Names of the nodes (empty when the bed is not up).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._state_file = self.folder / "bed.json"
        self.nodes: list[str] = []
        self._processes: dict[str, list[int]] = {}  # name of a node or daemon -> process id and its time of birth
        self._started: dict[str, subprocess.Popen[bytes]] = {}  # those that are children of this process
        if self._state_file.exists():
            state = json.loads(self._state_file.read_text())
            self.nodes, self._processes = state["nodes"], state["processes"]

    @property
    def settings(self) -> Path:
        """slurm.conf; commands find this cluster by SLURM_CONF."""
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What to add to the environment of SLURM's commands."""
        return {"SLURM_CONF": str(self.settings)}

    def up(self, nodes: int = 4, cpus: int = 16) -> None:
        """Starts `nodes` nodes of `cpus` CPUs each and returns when all are idle.

        Raises:
            BedError: Not possible here, the folder is in use, or a daemon does not start (with its last line).
        """
        if not 1 <= nodes <= 250 or cpus < 1:
            raise BedError(f"{nodes} nodes of {cpus} CPUs cannot be; a bed has 1 to 250 nodes of at least one CPU")
        if reason := why_not():
            raise BedError(f"no SLURM test bed here: {reason}")
        if self.folder.exists() and any(self.folder.iterdir()):
            raise BedError(f"{self.folder} is not empty; is a test bed up there? `slurm/testbed down --folder DIR` ends it")
        if len(os.fsencode(self.folder)) > 70:
            raise BedError(
                f"{self.folder} is too long a path for sockets (108 bytes with their names); choose a shorter one"
            )
        for part in ("state", "log", "pid"):
            (self.folder / part).mkdir(parents=True)
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._write_settings(cpus)
        self._save()
        try:
            self._start_munged()
            self._wait(lambda: (self.folder / "munge").exists(), "munged")
            self._start("slurmctld", ["slurmctld", "-D"])
            for node in self.nodes:
                self.start_node(node)
            self._wait(lambda: set(self.states().values()) == {"idle"}, "slurmctld")
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Ends all daemons and all processes of jobs, and removes the folder. A bed that is not up is fine."""
        if not self._state_file.exists():
            if self.folder.exists():
                raise BedError(f"{self.folder} is no folder of a test bed; nothing was removed")
            return
        for name in list(self._processes):
            self._kill(name)
        shutil.rmtree(self.folder)
        self.nodes = []

    def start_node(self, node: str) -> None:
        """Starts a node; soon after it is idle, also when it was down before."""
        self._known(node)
        if self.alive(node):
            raise BedError(f"{node} is running")
        (self.folder / "state" / node).mkdir(exist_ok=True)
        self._start(node, ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts",
                           "sh", "-c", NODE_START, "sh", node, f"{self.folder}/hosts"])  # fmt: skip

    def kill_node(self, node: str) -> None:
        """Ends a node at once, with every process on it, as a loss of power does. Returns when they are gone."""
        self._known(node)
        self._kill(node)

    def alive(self, name: str) -> bool:
        """Whether the node or daemon of that name runs."""
        pid, born = self._processes.get(name, (0, 0))
        return bool(pid) and _birth(pid) == born

    def processes(self, node: str) -> list[int]:
        """Process ids, as this machine counts them, of everything on a node: slurmd, steps and what jobs have started."""
        self._known(node)
        inits = _children(self._processes[node][0]) if self.alive(node) else []
        spaces = {_space(pid) for pid in inits}
        return [pid for pid in _pids() if _space(pid) in spaces - {None}]

    def states(self) -> dict[str, str]:
        """Each node's state in the words of sinfo (idle, mixed, down, ...); empty when slurmctld does not answer."""
        answer = _tool("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", **self.environment)
        return dict(line.split() for line in answer.stdout.splitlines())

    def _known(self, node: str) -> None:
        if not self.nodes:
            raise BedError(f"no test bed is up in {self.folder}; `slurm/testbed up` starts one")
        if node not in self.nodes:
            raise BedError(f"there is no node {node}; this bed has {', '.join(self.nodes)}")

    def _write_settings(self, cpus: int) -> None:
        network = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        addresses = {node: f"{network}.{number}" for number, node in enumerate(self.nodes, 1)}
        ports = _free_ports(len(self.nodes) + 1)
        template = Path(__file__).with_name("testbed.conf").read_text()
        lines = [
            f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={port} CPUs={cpus} RealMemory=64000"
            for (node, address), port in zip(addresses.items(), ports[1:], strict=True)
        ]
        self.settings.write_text(
            template.format(
                folder=self.folder,
                host=socket.gethostname().split(".")[0],
                port=ports[0],
                name=f"bed{ports[0]}",
                nodes="\n".join(lines),
            )
        )
        known = Path("/etc/hosts").read_text()
        names = "".join(f"{address} {node}\n" for node, address in addresses.items())
        (self.folder / "hosts").write_text(f"{known.rstrip()}\n{names}")
        key = self.folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _start_munged(self) -> None:
        files = {
            "socket": "munge",
            "key-file": "key",
            "pid-file": "pid/munged",
            "log-file": "log/munge",
            "seed-file": "state/seed",
        }
        # --force: a folder that others cannot enter is fine, it is root who uses it.
        options = [f"--{option}={self.folder}/{file}" for option, file in files.items()]
        self._start("munged", ["munged", "--foreground", "--force", *options])

    def _start(self, name: str, command: list[str]) -> None:
        # Nothing else from our environment: what started the bed must not show in it.
        environment = {"PATH": PATH, **self.environment}
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self._started[name] = process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=environment, start_new_session=True
            )
        self._processes[name] = [process.pid, _birth(process.pid) or 0]
        self._save()

    def _kill(self, name: str) -> None:
        if not self.alive(name):
            return
        pid = self._processes[name][0]
        # A node's first process is the child of `unshare`; with it everything in its namespace dies.
        victims = [*(_children(pid) if name in self.nodes else []), pid]
        born = {victim: _birth(victim) for victim in victims}
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        while any(time_of_birth is not None and _birth(victim) == time_of_birth for victim, time_of_birth in born.items()):
            time.sleep(0.01)
        if name in self._started:
            self._started.pop(name).wait()

    def _save(self) -> None:
        self._state_file.write_text(json.dumps({"nodes": self.nodes, "processes": self._processes}))

    def _wait(self, ready: Callable[[], bool], name: str) -> None:
        end = time.monotonic() + START_SECONDS
        while not ready():
            dead = [process for process in self._processes if not self.alive(process)]
            if dead or time.monotonic() > end:
                name = dead[0] if dead else name
                lines = (self.folder / "log" / f"{name}.out").read_text().splitlines() or ["nothing"]
                raise BedError(
                    f"{name} {'ended' if dead else f'is not ready after {START_SECONDS} s'}; it last said: {lines[-1]}"
                )
            time.sleep(0.1)


def _tool(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": PATH, **environment})


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _birth(pid: int) -> int | None:
    """When the process began (ticks since boot), to tell it from a later one of the same number; None: it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _space(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, below those that the kernel gives to outgoing connections."""
    found: list[int] = []
    for port in random.sample(range(20000, 32000), 1000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise BedError(f"fewer than {count} of 1000 ports tried are free")
