"""Join and leave the process group of a run: device, backend, timeouts."""

from __future__ import annotations

import datetime
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megamoe.core.errors import PortTakenError, UserError

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)  # a peer that is silent for longer counts as dead


@contextmanager
def joined_world() -> Iterator[torch.device]:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR/PORT describe, and leave it at the end.

    Yields this rank's device: the GPU number LOCAL_RANK with NCCL if there is one, else the CPU with gloo.

    Raises:
        UserError: this machine has GPUs, but fewer than ranks.
        PortTakenError: another process listens on MASTER_PORT.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        device = _own_gpu(int(os.environ["LOCAL_RANK"]))
    else:
        device = torch.device("cpu")
        # DeepSpeed would warn that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives under names that torch 2.13 has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    if not cuda:
        # DeepSpeed would compile a shared-memory all-reduce for inference with g++ at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_uncompiled("deepspeed.runtime.zero.muon.muon_optimizer")
    try:
        deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=COLLECTIVE_TIMEOUT)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):  # torch gives the number of the error in its text alone
            port = os.environ.get("MASTER_PORT")
            raise PortTakenError(f"MASTER_PORT {port} is used by another process; take another port") from error
        raise
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _own_gpu(local_rank: int) -> torch.device:
    """Select this rank's GPU before anything is allocated on it.

    Raises:
        UserError: there is no such GPU.
    """
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this machine has no GPU: {torch.cuda.device_count()} can be seen; start as many ranks "
            "as GPUs (--nproc, launch.ranks_per_node), or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    # Rows per expert and caption lengths change at every step: fixed segments would fragment.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # NCCL's own monitor aborts without naming the step. train.watchdog_seconds (480) has to fire first, then the
    # timeout of the collective that hangs.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(1.5 * COLLECTIVE_TIMEOUT.total_seconds())))
    # fp32 means fp32: with TF32's 10 bits, layouts would no longer agree with each other or with the CPU.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _import_uncompiled(name: str) -> None:
    """Import a module of DeepSpeed without compiling the functions that it wants compiled.

    DeepSpeed's engines import an optimizer that we do not use. Starting the compiler for it would cost each rank two
    seconds.
    """
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        importlib.import_module(name)
    finally:
        compiler.compile = compile_
