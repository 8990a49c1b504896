"""The way that a GPU takes through the model: the same numbers as the CPU's, and nothing read back on the way.

Its branches are forced on the CPU; on the meta device whatever reads a value raises.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamoe.config import Config, MoEConfig
from megamoe.core.packed_batch import IGNORE, PackedBatch
from megamoe.model import experts as experts_module
from megamoe.model import moe as moe_module
from megamoe.model.batch import announce_labels, labelled_positions
from megamoe.model.moe import SparseMLP
from megamoe.model.parameter import ExpertShard
from megamoe.model.vlm import VisionLanguageModel, build_model
from tests.model.small import IMAGE, pack, random_samples, small_config, small_model


@pytest.fixture
def device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_module, "_keeps_padding", lambda x: True)


def gradients(model: VisionLanguageModel, pixels: Tensor, text: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    total, losses = model(pixels, text)
    (total + losses.sum()).backward()
    return [total.detach(), losses.detach()], {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def batch(config: Config) -> tuple[Tensor, Tensor]:
    """Sequences of 1, 2 and 4 samples: padding and unused picture slots in two of them."""
    patches = config.model.vision.patches
    rows = [pack(random_samples(config, n, config.run.seed + n), patches, 64, 4) for n in (1, 2, 4)]
    return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])


@pytest.mark.parametrize("seed", range(6))
def test_losses_and_all_gradients_are_those_of_the_path_that_drops_padding(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(seed, model__vision__sparse_every=1, model__decoder__sparse_every=1)
    model = small_model(config)
    pixels, text = batch(config)
    expected_losses, expected = gradients(model, pixels, text)
    monkeypatch.setattr(moe_module, "_keeps_padding", lambda x: True)
    text = text.clone()  # a batch of its own: what is worked out once per batch is worked out again
    announce_labels(text, PackedBatch.of(text).targets)
    losses, actual = gradients(model, pixels, text)
    torch.testing.assert_close(losses, expected_losses, atol=1e-5, rtol=1e-6)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(actual[name], gradient, atol=1e-5 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("padding", [0.0, 0.4, 1.0])
def test_padding_comes_out_as_zero_and_leaves_no_gradient(top_k: int, padding: float) -> None:
    generator = torch.Generator().manual_seed(top_k)
    block = SparseMLP(8, 6, MoEConfig(experts=4, top_k=top_k), ExpertShard(), 1.0, 1.0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 1, generator=generator)
    valid = torch.rand(2, 7, generator=generator) >= padding
    real = torch.randn(2, 7, 8, generator=generator)
    results = []
    for seed in (1, 2):  # other content of the padding
        noise = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(seed))
        x = torch.where(valid.unsqueeze(-1), real, 50 * noise).requires_grad_()
        block.zero_grad()
        out, losses, counts = block(x, valid)
        assert counts.sum() == top_k * valid.sum()
        assert not out[~valid].any()
        (out.square().sum() + losses.sum()).backward()
        assert x.grad is not None and not x.grad[~valid].any()
        results.append([out.detach(), losses.detach(), *(p.grad.clone() for p in block.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_labelled_positions_are_the_same_whether_their_number_is_known_or_not() -> None:
    text = torch.randint(0, 9, (3, 3, 20), generator=torch.Generator().manual_seed(0))
    labels = PackedBatch.of(text).labels
    labels[labels < 5] = IGNORE
    found = labelled_positions(text)
    known = text.clone()
    announce_labels(known, len(found))
    assert torch.equal(labelled_positions(known), found) and len(found) > 5


@pytest.mark.usefixtures("device_path")
def test_nothing_is_read_back_from_the_device_in_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "_fused", lambda rows, weight: True)
    config = small_config(3, model__vision__sparse_every=1, model__decoder__sparse_every=1, model__decoder__expert_width=8)
    with torch.device("meta"):
        model = VisionLanguageModel(build_model(config, IMAGE).specs, ExpertShard(), None).bfloat16()
    pixels, text = (tensor.to("meta") for tensor in batch(config))
    announce_labels(text, 12)
    total, losses = model(pixels, text)
    (total + losses.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_meta_device_notices_a_read() -> None:
    config = small_config(3, model__vision__sparse_every=1)
    with torch.device("meta"):
        model = VisionLanguageModel(build_model(config, IMAGE).specs, ExpertShard(), None)
    with pytest.raises(RuntimeError):
        model(*(tensor.to("meta") for tensor in batch(config)))
