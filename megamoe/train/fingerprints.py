"""Fingerprint what the losses depend on besides the config, and compare it between ranks."""

from __future__ import annotations

import torch.distributed as dist

from megamoe.core.errors import DataError
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import DataSet, data_fingerprint


def agreed_fingerprints(tokenizer: Tokenizer, data: DataSet) -> dict[str, str]:
    """Return the fingerprints of ``tokenizer`` and ``data``, equal on all ranks. All ranks call.

    Raises:
        DataError: a rank has another tokenizer or another list of shards.
    """
    fingerprints = {"tokenizer": tokenizer.fingerprint, "data": data_fingerprint(data)}
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, fingerprints)
    for rank, theirs in enumerate(everyone):
        for what, value in theirs.items():
            if value != everyone[0][what]:
                raise DataError(
                    f"data.{'train' if what == 'data' else what}: rank {rank} does not see what rank 0 sees ({value}, "
                    f"{everyone[0][what]}); are the files on a shared file system, and complete?"
                )
    return fingerprints
