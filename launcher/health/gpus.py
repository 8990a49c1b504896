"""Read the GPUs of a node from nvidia-smi and find what speaks against using them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megamoe.config.launch import LaunchConfig

SECONDS = 30.0  # nvidia-smi takes seconds on a node with eight GPUs, and never answers on one whose driver hangs
MIB = 1 << 20
GIB = 1 << 30

_GPU = ("index", "uuid", "memory.used", "ecc.errors.uncorrected.volatile.total")
_REMAPPED = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
_PROCESS = ("gpu_uuid", "pid", "process_name")

Finding = tuple[str, str, str, str]
"""What was looked at, what was measured, the limit, what to do."""

Query = Callable[[str, Sequence[str]], list[list[str]]]
"""Rows of a query of nvidia-smi: (gpu, remapped-rows, compute-apps; fields) -> values."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        index: its number in nvidia-smi.
        uuid: its permanent name.
        used: bytes of its memory in use.
        errors: uncorrected memory errors since the driver was loaded; None if it does not count them.
        remapping: why its memory needs the administrator (a row waits to be remapped, or could not be); empty: it does not.
        processes: ``name (pid)`` of those that compute on it and that may be seen from here.
    """

    index: int
    uuid: str
    used: int
    errors: int | None
    remapping: str
    processes: tuple[str, ...]


def query(what: str, fields: Sequence[str]) -> list[list[str]]:
    """Ask nvidia-smi.

    Raises:
        OSError: there is none.
        subprocess.SubprocessError: it failed, or takes too long.
    """
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
    return [[value.strip() for value in line.split(",", len(fields) - 1)] for line in said.splitlines() if line.strip()]


def visible_gpus(ask: Query = query, environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Return the GPUs that ranks of this node will see: all that the job may use, within CUDA_VISIBLE_DEVICES.

    Raises:
        OSError, subprocess.SubprocessError: as of :func:`query`.
        ValueError: nvidia-smi says what cannot be understood.
    """
    processes: dict[str, list[str]] = {}
    for uuid, pid, name in ask("compute-apps", _PROCESS):
        processes.setdefault(uuid, []).append(f"{os.path.basename(name)} ({pid})")
    try:
        remapped = {uuid: _remapping(pending, failure) for uuid, pending, failure in ask("remapped-rows", _REMAPPED)}
    except subprocess.CalledProcessError:  # older drivers and GPUs do not know the question
        remapped = {}
    gpus = [
        Gpu(
            index=int(index),
            uuid=uuid,
            used=int(used) * MIB,
            errors=int(errors) if errors.isdigit() else None,
            remapping=remapped.get(uuid, ""),
            processes=tuple(processes.get(uuid, ())),
        )
        for index, uuid, used, errors in ask("gpu", _GPU)
    ]
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    names = [name.strip() for name in chosen.split(",")]
    return [gpu for gpu in gpus if str(gpu.index) in names or any(name and gpu.uuid.startswith(name) for name in names)]


def gpu_findings(limits: LaunchConfig, ask: Query = query, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Find what speaks against this node's GPUs; nothing when the run uses none."""
    wanted = limits.gpus_per_node
    if not wanted:
        return []
    limit = f"{wanted} wanted (launch.gpus_per_node)"
    try:
        gpus = visible_gpus(ask, environment)
    except subprocess.CalledProcessError as error:
        said = " ".join((error.stdout or error.stderr or "nothing").split())[:200]
        return [("GPUs", f"nvidia-smi fails with status {error.returncode}: {said}", limit, "reset the GPU or the node")]
    except subprocess.TimeoutExpired:
        return [("GPUs", f"nvidia-smi gives no answer in {SECONDS:g} s", limit, "its driver hangs: restart the node")]
    except OSError as error:
        return [("GPUs", f"no nvidia-smi ({error.strerror})", limit, "install the driver, or use other nodes")]
    except ValueError as error:
        return [("GPUs", f"nvidia-smi says what is not understood ({error})", limit, "run nvidia-smi there and look")]
    findings: list[Finding] = []
    if len(gpus) < wanted:
        remedy = "ask the job for as many, look at CUDA_VISIBLE_DEVICES there, or reset the GPU that is missing"
        findings.append(("GPUs visible", str(len(gpus)), limit, remedy))
    for gpu in gpus[:wanted]:
        name = f"GPU {gpu.index}"
        if gpu.errors:
            findings.append((f"{name} uncorrected memory errors", str(gpu.errors), "0 allowed", "reset or replace it"))
        if gpu.remapping:
            findings.append((f"{name} memory", gpu.remapping, "none allowed", "reset or replace it"))
        allowed = limits.health.gpu_used
        if allowed and gpu.used > allowed * GIB:
            who = ", ".join(gpu.processes) or "nobody that is seen from here"
            measured = f"{gpu.used / GIB:.1f} GiB by {who}"
            findings.append(
                (f"{name} memory in use", measured, f"at most {allowed:g} GiB (launch.health.gpu_used)", "end what uses it")
            )
    return findings


def _remapping(pending: str, failure: str) -> str:
    # 0/1 in new drivers, No/Yes in old ones, [N/A] where there is no such thing.
    if failure.lower() in ("1", "yes"):
        return "a faulty row could not be remapped"
    return "a faulty row waits to be remapped" if pending.lower() in ("1", "yes") else ""
