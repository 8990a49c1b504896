"""``transformers`` computes the same: logits and choices of experts, from the same weights under its own names."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import that reads it

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megamoe.config import Config
from megamoe.core.packed_batch import IGNORE, PackedBatch
from megamoe.model.moe import Router
from megamoe.model.vlm import VisionLanguageModel, named_parameters
from tests.model.hf_mapping import hf_config, hf_name, hf_state
from tests.model.small import IMAGE, Pictured, logits, pack, random_samples, small_config, small_model

SEEDS = range(10)


def oracle(config: Config, stack: VisionLanguageModel, attention: str = "eager") -> LlavaForConditionalGeneration:
    model = LlavaForConditionalGeneration(hf_config(config.model, IMAGE, attention))
    model.load_state_dict(hf_state(stack), strict=True)
    return model.eval()


def oracle_pixels(samples: list[Pictured]) -> Tensor:
    """As SigLIP's image processor has them: rescaled by 1/255, mean and deviation one half, channels first."""
    pixels = torch.stack([sample.pixels for sample in samples]).permute(0, 3, 1, 2).float()
    return (pixels / 255 - 0.5) / 0.5


def record_choices(model: nn.Module) -> list[Tensor]:
    """Experts chosen for each token, sorted, one tensor (T, K) per router in the order they run."""
    choices: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _m, _i, out: choices.append(out.experts_TK.sort().values))
        elif isinstance(module, Qwen3MoeTopKRouter):
            module.register_forward_hook(lambda _m, _i, out: choices.append(out[2].sort().values))
    return choices


def oracle_config(seed: int, kernel: str = "sdpa") -> Config:
    return small_config(
        seed, model__vision__sparse_every=0, model__decoder__sparse_every=1 + seed % 2, model__attention=kernel
    )


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_logits_and_chosen_experts_are_those_of_transformers(seed: int) -> None:
    config = oracle_config(seed)
    stack = small_model(config)
    model = oracle(config, stack)
    # Rows of one length: five words each.
    samples = [Pictured(sample.pixels, (sample.words * 5)[:5]) for sample in random_samples(config, 3, seed)]
    rows = [pack([sample], config.model.vision.patches, config.model.vision.patches + 5, 1) for sample in samples]
    pixels, text = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    ours, theirs = record_choices(stack), record_choices(model)

    own_logits = logits(stack, pixels, text)
    oracle_logits = model(input_ids=PackedBatch.of(text).ids, pixel_values=oracle_pixels(samples)).logits

    assert oracle_logits.std() > 1, "the check needs logits that the whole model takes part in"
    torch.testing.assert_close(own_logits, oracle_logits, atol=1e-4, rtol=0)
    sparse = sum(config.model.decoder.is_sparse(i) for i in range(config.model.decoder.depth))
    assert len(ours) == len(theirs) == sparse
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == (PackedBatch.of(text).ids.numel(), config.model.moe.top_k)
        assert torch.equal(own, other)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("seed", "kernel"), [(seed, "sdpa") for seed in SEEDS] + [(2, "flex"), (5, "flex"), (9, "flex")])
def test_packed_samples_have_the_logits_that_transformers_gives_each_alone(seed: int, kernel: str) -> None:
    config = oracle_config(seed, kernel)
    stack = small_model(config)
    model = oracle(config, stack, attention="sdpa")
    samples = random_samples(config, 3, seed)
    packed_logits = logits(stack, *pack(samples, config.model.vision.patches, 64, 4))
    start = 0
    for sample in samples:
        _, text = pack([sample], config.model.vision.patches, config.model.vision.patches + len(sample.words), 1)
        alone = model(input_ids=PackedBatch.of(text).ids, pixel_values=oracle_pixels([sample])).logits
        stop = start + text.shape[2]
        labelled = PackedBatch.of(text[0]).labels != IGNORE
        assert labelled.sum() == len(sample.words)
        torch.testing.assert_close(packed_logits[:, start:stop][:, labelled], alone[:, labelled], atol=1e-4, rtol=0)
        start = stop


@pytest.mark.parametrize("seed", range(6))
def test_gradients_of_the_caption_loss_are_those_of_transformers(seed: int) -> None:
    config = oracle_config(seed)
    stack = small_model(config)
    model = oracle(config, stack)
    samples = random_samples(config, 1, seed)
    patches = config.model.vision.patches
    pixels, text = pack(samples, patches, patches + len(samples[0].words), 1)
    total, _ = stack(pixels, text)
    total.backward()
    scores = model(input_ids=PackedBatch.of(text).ids, pixel_values=oracle_pixels(samples)).logits
    nn.functional.cross_entropy(scores.flatten(0, 1), PackedBatch.of(text).labels.flatten(), reduction="sum").backward()
    theirs = dict(model.named_parameters())
    for spec, layer in zip(stack.specs, stack.layers, strict=True):
        for name, parameter in named_parameters(spec.name, layer):
            other = theirs[hf_name(name)].grad
            assert parameter.grad is not None and other is not None, name
            scale = max(1.0, other.abs().max().item())
            torch.testing.assert_close(
                parameter.grad, other.view_as(parameter), atol=2e-5 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_setting_of_the_vision_feature_layer_matters() -> None:
    """The finding in :mod:`tests.model.hf_mapping`: without it, the last norm of the encoder is left out."""
    config = oracle_config(0)
    stack = small_model(config)
    samples = random_samples(config, 1, 0)
    pixels, text = pack(samples, config.model.vision.patches, config.model.vision.patches + len(samples[0].words), 1)
    settings = hf_config(config.model, IMAGE)
    settings.vision_config.tie_last_hidden_states = None
    model = LlavaForConditionalGeneration(settings).eval()
    model.load_state_dict(hf_state(stack), strict=True)
    with torch.no_grad():
        other = model(input_ids=PackedBatch.of(text).ids, pixel_values=oracle_pixels(samples)).logits
        assert (logits(stack, pixels, text) - other).abs().max() > 0.1
