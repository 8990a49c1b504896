"""What a rank sets before it touches its GPU. No GPU here: torch.cuda is replaced, all else is real."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from megamoe.config import Config
from megamoe.core.errors import UserError
from megamoe.parallel.deepspeed.process_group import COLLECTIVE_TIMEOUT, _own_gpu


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what is set here is forgotten afterwards
        monkeypatch.delenv(name)
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield taken
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32


def test_a_rank_takes_the_gpu_of_its_number_with_mocked_cuda(two_gpus: list[torch.device]) -> None:
    assert _own_gpu(1) == torch.device("cuda", 1)
    assert two_gpus == [torch.device("cuda", 1)]
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_the_users_own_allocator_settings_stay_with_mocked_cuda(
    two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    _own_gpu(0)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_more_ranks_than_gpus_is_one_clear_error_with_mocked_cuda(two_gpus: list[torch.device]) -> None:
    with pytest.raises(UserError, match="rank 2 of this machine has no GPU: 2 can be seen; start as many ranks as GPUs"):
        _own_gpu(2)
    assert two_gpus == []


def test_a_hang_is_named_by_our_watchdog_before_nccl_ends_the_rank(two_gpus: list[torch.device]) -> None:
    _own_gpu(0)
    heartbeat = float(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"])
    assert Config().train.watchdog_seconds < COLLECTIVE_TIMEOUT.total_seconds() < heartbeat
