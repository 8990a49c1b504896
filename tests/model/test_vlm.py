"""The model as a whole: sizes known ahead, initial weights that know no layout, names, number formats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megamoe.config import Config
from megamoe.model.decoder import DecoderLayer
from megamoe.model.loss import CaptionLoss
from megamoe.model.parameter import ExpertShard, info_of
from megamoe.model.pipeline_layer import BlockLayer
from megamoe.model.size import model_size
from megamoe.model.vision import VisionLayer
from megamoe.model.vlm import (
    build_layer,
    build_model,
    layer_specs,
    named_parameters,
)
from tests.model.small import IMAGE, logits, pack, random_samples, small_config, small_model


def parameters_of(config: Config, shard: ExpertShard, seed: int) -> dict[str, nn.Parameter]:
    """One rank's part of the model under the names of checkpoints."""
    return {
        name: parameter
        for spec in layer_specs(config.model, IMAGE)
        for name, parameter in named_parameters(spec.name, build_layer(spec, shard, seed))
    }


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000))
def test_size_computed_from_settings_is_that_of_the_built_layers(seed: int) -> None:
    config = small_config(seed)
    size = model_size(config)
    specs = layer_specs(config.model, IMAGE)
    assert [layer.name for layer in size.layers] == [spec.name for spec in specs]
    assert [layer.sparse for layer in size.layers] == [spec.sparse for spec in specs]
    for computed, spec in zip(size.layers, specs, strict=True):
        built = list(build_layer(spec, ExpertShard(), 0).parameters())
        expert = sum(parameter.numel() for parameter in built if info_of(parameter).is_expert)
        assert (computed.expert, computed.parameters) == (expert, sum(parameter.numel() for parameter in built)), spec.name
        # A token visits top_k of the experts.
        unused = expert // config.model.moe.experts * (config.model.moe.experts - config.model.moe.top_k)
        assert computed.active == computed.parameters - unused, spec.name
    assert size.parameters == sum(parameter.numel() for parameter in build_model(config, IMAGE).parameters())


@pytest.mark.parametrize("parts", [2, 4])
def test_initial_weights_of_expert_shards_are_parts_of_the_whole(parts: int) -> None:
    config = small_config(5, model__moe__experts=8, model__moe__top_k=2, model__vision__sparse_every=1)
    whole = parameters_of(config, ExpertShard(), seed=9)
    shards = [parameters_of(config, ExpertShard(rank, parts), seed=9) for rank in range(parts)]
    assert any(info_of(parameter).is_expert for parameter in whole.values())
    for name, parameter in whole.items():
        pieces = [shard[name] for shard in shards]
        if info_of(parameter).is_expert:
            assert [info_of(piece).first_expert for piece in pieces] == [rank * 8 // parts for rank in range(parts)]
            assert torch.equal(torch.cat(pieces), parameter), name
        else:
            assert all(torch.equal(piece, parameter) for piece in pieces), name


def test_initial_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    config = small_config(4, model__vision__sparse_every=1)
    first, again = parameters_of(config, ExpertShard(), 1), parameters_of(config, ExpertShard(), 1)
    torch.manual_seed(123)
    torch.rand(7)
    later, other = parameters_of(config, ExpertShard(), 1), parameters_of(config, ExpertShard(), 2)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]) and torch.equal(parameter, later[name]), name
        assert torch.equal(parameter, other[name]) == (info_of(parameter).std == 0), name


def test_no_two_parameters_or_experts_start_equal() -> None:
    config = small_config(4, model__moe__experts=4, model__moe__top_k=1, model__vision__sparse_every=1)
    starts: list[Tensor] = []
    for parameter in parameters_of(config, ExpertShard(), 1).values():
        if info_of(parameter).std > 0:
            starts += list(parameter) if info_of(parameter).is_expert else [parameter]
    heads = {tuple(start.flatten()[:4].tolist()) for start in starts}
    assert len(heads) == len(starts)


def test_initial_weights_have_the_deviation_they_are_said_to_have() -> None:
    config = small_config(
        3, model__init_std=0.02, model__decoder__width=128, model__decoder__depth=2, model__decoder__mlp_width=256
    )
    for name, parameter in parameters_of(config, ExpertShard(), 0).items():
        std = info_of(parameter).std
        if std > 0 and parameter.numel() > 5000:
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 5 * std / parameter.numel() ** 0.5, name
    outputs = ("attention.out.weight", "mlp.down.weight", "mlp.fc2.weight", "experts.down")
    for name, parameter in parameters_of(config, ExpertShard(), 0).items():
        if ".blocks." in name and info_of(parameter).std > 0:
            depth = config.model.vision.depth if name.startswith("vision") else config.model.decoder.depth
            expected = 0.02 / (2 * depth) ** 0.5 if name.endswith(outputs) else 0.02
            assert info_of(parameter).std == pytest.approx(expected), name


@pytest.mark.parametrize("seed", range(4))
def test_names_of_layers_and_parameters_are_unique(seed: int) -> None:
    config = small_config(seed)
    layers = [spec.name for spec in layer_specs(config.model, IMAGE)]
    assert len(set(layers)) == len(layers)
    model = build_model(config, IMAGE)
    names = [
        name
        for spec, layer in zip(model.specs, model.layers, strict=True)
        for name, _ in named_parameters(spec.name, layer)
    ]
    assert len(set(names)) == len(names) == len(list(model.parameters()))


@pytest.mark.parametrize("seed", range(6))
def test_bf16_loss_is_close_to_that_of_fp32(seed: int) -> None:
    # As at the start of a training run: with the large weights of the other tests bf16 turns many a choice of experts.
    config = small_config(seed, model__init_std=0.05)
    model = build_model(config, IMAGE).eval()
    pixels, text = pack(random_samples(config, 3, seed), config.model.vision.patches, 64, 4)
    with torch.no_grad():
        total, losses = model(pixels, text)
        low_total, low_losses = model.bfloat16()(pixels, text)
    assert low_total.dtype == low_losses.dtype == torch.float32, "losses are summed in fp32"
    torch.testing.assert_close(low_total, total, rtol=0.01, atol=0)
    torch.testing.assert_close(low_losses, losses, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_load_counts_each_choice_of_each_real_token_in_training_and_none_in_evaluation(seed: int) -> None:
    config = small_config(seed, model__vision__sparse_every=1)
    model = small_model(config)
    patches, top_k = config.model.vision.patches, config.model.moe.top_k
    samples = random_samples(config, 3, seed)
    batch = pack(samples, patches, 64, 4)
    model(*batch)
    assert all(layer.load_E is None for layer in model.layers if isinstance(layer, BlockLayer))
    model.train()
    model(*batch)
    model(*batch)
    tokens = {VisionLayer: 3 * patches, DecoderLayer: sum(patches + len(sample.words) for sample in samples)}
    for spec, layer in zip(model.specs, model.layers, strict=True):
        if spec.sparse:
            assert layer.load_E.sum() == 2 * top_k * tokens[type(layer)], spec.name


def test_loss_of_a_step_is_the_mean_over_its_micro_batches() -> None:
    config = small_config(1, model__moe__aux_loss=0.5, model__moe__z_loss=0.25)
    loss = CaptionLoss(config.model.moe, sparse_blocks=3)
    loss.targets_per_micro_batch = 10.0  # 20 caption tokens in 2 micro-batches
    parts = [(torch.tensor(40.0), torch.tensor([3.0, 6.0])), (torch.tensor(60.0), torch.tensor([6.0, 12.0]))]
    mean = sum(loss(part) for part in parts) / 2
    assert mean.item() == pytest.approx(100 / 20 + 0.5 * 1.5 + 0.25 * 3.0)
    sums = loss.take()
    assert sums is not None and (sums / 2).tolist() == pytest.approx([mean.item(), 5.0, 1.5, 3.0])
    assert loss.take() is None


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_prefill_and_decode_step_score_what_the_whole_sequence_scores(seed: int) -> None:
    config = small_config(seed)
    model, patches = small_model(config), config.model.vision.patches
    samples = random_samples(config, 1, seed)
    pixels, text = pack(samples, patches, patches + len(samples[0].words), 1)
    expected_LV = logits(model, pixels, text)[0]
    prompt = text[:, :, : patches + 1]
    scores_BV, state = model.prefill(pixels[:, 0], prompt, new_tokens=8)
    torch.testing.assert_close(scores_BV[0], expected_LV[patches], atol=1e-4, rtol=1e-5)
    for position in range(patches + 1, text.shape[2]):
        scores_BV = model.decode_step(text[:, 0, position], torch.tensor([True]), state)
        torch.testing.assert_close(scores_BV[0], expected_LV[position], atol=1e-4, rtol=1e-5)


def test_parts_of_the_model_are_found_by_what_they_are() -> None:
    config = small_config(2)
    model = build_model(config, IMAGE)
    assert model.patch_embedding is model.layers[0] and model.head is model.layers[-1]
    assert model.projector is model.layers[config.model.vision.depth + 1]
    assert model.decoder_layers == list(model.layers[-1 - config.model.decoder.depth : -1])
