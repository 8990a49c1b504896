"""Joining and leaving the ranks of a run: device, backend, process group."""

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

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)  # a peer that is silent for longer is taken for dead


@contextmanager
def joined_world() -> Iterator[torch.device]:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR/PORT describe; leave it at the end.

    Yields this rank's device: the GPU number LOCAL_RANK with NCCL if there is one, else the CPU with gloo.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # DeepSpeed would warn that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives under names that torch 2.13 has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    # A shared-memory all-reduce for inference that DeepSpeed would compile with g++ at each first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_uncompiled("deepspeed.runtime.zero.muon.muon_optimizer")
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _import_uncompiled(name: str) -> None:
    """Import a module of DeepSpeed that wants its functions compiled, as they are.

    Its engines import an optimizer that is not ours; the compiler alone costs each rank two seconds at each start.
    """
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        importlib.import_module(name)
    finally:
        compiler.compile = compile_
