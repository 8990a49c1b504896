"""What else lies in a sequence changes nothing for a sample: neighbours, padding, unused picture slots."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from megamoe.config import Config
from megamoe.core.packed_batch import IGNORE, PackedBatch
from megamoe.model.attention import packed_causal_mask, segment_positions
from megamoe.model.vlm import VisionLanguageModel
from tests.model.small import IMAGE, logits, pack, random_samples, small_config, small_model

SEEDS = range(8)
KERNELS = ["sdpa", "flex"]


def gradients(model: VisionLanguageModel, pixels: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Of the summed loss and both auxiliary losses; None counts as zero."""
    model.zero_grad()
    total, losses = model(pixels, text)
    (total + losses.sum()).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(actual[name], gradient, atol=1e-5 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("seed", "kernel"), [(seed, "sdpa") for seed in SEEDS] + [(seed, "flex") for seed in range(4)])
def test_packed_samples_have_the_logits_they_have_alone(seed: int, kernel: str) -> None:
    config = small_config(seed, model__attention=kernel)
    model = small_model(config)
    patches = config.model.vision.patches
    samples = random_samples(config, 3, seed)
    packed = logits(model, *pack(samples, patches, 64, 4))
    start = 0
    for sample in samples:
        pixels, text = pack([sample], patches, patches + len(sample.words), 1)
        stop = start + text.shape[2]
        labelled = PackedBatch.of(text[0]).labels != IGNORE
        alone = logits(model, pixels, text)
        torch.testing.assert_close(packed[:, start:stop][:, labelled], alone[:, labelled], atol=1e-5, rtol=0)
        start = stop


@torch.no_grad()  # on a CPU, flex attention has no backward
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("seed", range(4))
def test_block_mask_and_dense_mask_give_the_same_losses(seed: int) -> None:
    results = []
    for kernel in KERNELS:
        config = small_config(seed, model__attention=kernel)
        # Tensors of its own for each kernel: masks are kept per tensor.
        results.append(small_model(config)(*_batch(config)))
    for dense, block in zip(*results, strict=True):
        torch.testing.assert_close(block, dense, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_content_of_padding_and_of_unused_picture_slots_changes_neither_loss_nor_gradients(seed: int) -> None:
    config = small_config(seed)
    model = small_model(config)
    pixels, text = _batch(config)
    used = (PackedBatch.of(text).ids == IMAGE).sum(1) // config.model.vision.patches
    assert (PackedBatch.of(text).segments == 0).any() and (used < pixels.shape[1]).any()
    expected = gradients(model, pixels, text)
    losses = model(pixels, text)

    generator = torch.Generator().manual_seed(seed)
    other_pixels, other_text = pixels.clone(), text.clone()
    for b in range(len(pixels)):
        unused = other_pixels[b, int(used[b]) :]
        unused.copy_(torch.randint(0, 256, unused.shape, dtype=torch.uint8, generator=generator))
    padding = PackedBatch.of(text).segments == 0
    PackedBatch.of(other_text).ids[padding] = torch.randint(4, 40, (int(padding.sum()),), generator=generator)
    for other, same in zip(model(other_pixels, other_text), losses, strict=True):
        torch.testing.assert_close(other, same, atol=1e-5, rtol=1e-6)
    assert_same_gradients(gradients(model, other_pixels, other_text), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_amount_of_padding_and_of_picture_slots_changes_neither_loss_nor_gradients(seed: int) -> None:
    config = small_config(seed)
    model = small_model(config)
    samples = random_samples(config, 2, seed)
    tight = sum(config.model.vision.patches + len(sample.words) for sample in samples)
    small = pack(samples, config.model.vision.patches, tight, 2)
    large = pack(samples, config.model.vision.patches, tight + 23, 5)
    for other, same in zip(model(*large), model(*small), strict=True):
        torch.testing.assert_close(other, same, atol=1e-5, rtol=1e-6)
    assert_same_gradients(gradients(model, *large), gradients(model, *small))


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_of_a_micro_batch_is_the_sum_over_its_sequences_and_auxiliary_losses_are_their_mean(seed: int) -> None:
    config = small_config(seed)
    model = small_model(config)
    pixels, text = _batch(config)
    total, losses = model(pixels, text)
    each = [model(pixels[b : b + 1], text[b : b + 1]) for b in range(len(pixels))]
    torch.testing.assert_close(total, torch.stack([part[0] for part in each]).sum(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(losses, torch.stack([part[1] for part in each]).mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mask_is_made_once_per_batch_and_kept_no_longer_than_the_batch(kernel: str) -> None:
    text = torch.randint(0, 3, (2, 3, 16))
    mask = packed_causal_mask(text, kernel)
    assert packed_causal_mask(text, kernel) is mask
    alive = weakref.ref(mask)
    del text, mask
    gc.collect()
    assert alive() is None


def test_segment_positions_count_from_zero_in_each_segment() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7, 8]])
    positions = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5], [0] * 8]
    assert segment_positions(segments).tolist() == positions


def _batch(config: Config) -> tuple[Tensor, Tensor]:
    """Three sequences of 1, 2 and 4 samples."""
    rows = [
        pack(random_samples(config, count, config.run.seed + count), config.model.vision.patches, 64, 4)
        for count in (1, 2, 4)
    ]
    return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
