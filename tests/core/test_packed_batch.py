"""Packed text is read by name, alike in NumPy and torch, and written without torch."""

from __future__ import annotations

import subprocess
import sys

import torch

from megamoe.core.packed_batch import IGNORE, PackedBatch, empty_text, write_sample
from tests.training import ROOT

PAD, IMAGE = 0, 3


def test_a_sample_is_written_where_it_belongs_and_its_labels_are_shifted() -> None:
    text = empty_text(2, 9, PAD)
    end = write_sample(text[1], 1, 4, IMAGE, 3, [7, 8, 2])
    assert end == 7
    ids, segments, labels = PackedBatch.of(text[1])
    assert ids.tolist() == [PAD, IMAGE, IMAGE, IMAGE, 7, 8, 2, PAD, PAD]
    assert segments.tolist() == [0, 4, 4, 4, 4, 4, 4, 0, 0]
    assert labels.tolist() == [IGNORE, IGNORE, IGNORE, 7, 8, 2, IGNORE, IGNORE, IGNORE]
    assert (text[0] == empty_text(1, 9, PAD)[0]).all(), "the other sequence is untouched"


def test_a_prompt_has_no_labels() -> None:
    text = empty_text(1, 5, PAD)
    write_sample(text[0], 0, 1, IMAGE, 2, [7], labelled=False)
    assert PackedBatch.of(text).targets == 0
    assert PackedBatch.of(text).tokens == 3


def test_torch_and_numpy_are_named_alike_and_torch_compares_labels_like_its_cross_entropy() -> None:
    text = empty_text(2, 6, PAD)
    write_sample(text[0], 0, 1, IMAGE, 2, [7, 2])
    batch, tensors = PackedBatch.of(text), PackedBatch.of(torch.from_numpy(text))
    assert all((one == other.numpy()).all() for one, other in zip(batch, tensors, strict=True))
    assert (batch.tokens, batch.targets) == (tensors.tokens, tensors.targets) == (4, 2)
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE
    tensors.labels[:] = 5
    assert (text[:, 2] == 5).all(), "the names are views"


def test_data_workers_pack_without_torch() -> None:
    code = "import sys, megamoe.data.loader.worker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
