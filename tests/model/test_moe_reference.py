"""The sparse block against a plain float64 loop over tokens and experts: values, losses, and every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from megamoe.config import MoEConfig
from megamoe.model import experts as experts_module
from megamoe.model.experts import grouped_linear
from megamoe.model.moe import SparseMLP
from megamoe.model.parameter import ExpertShard

WIDTH, HIDDEN = 6, 5
BALANCE, Z = 0.7, 0.3  # weights of the auxiliary losses


@dataclass(frozen=True)
class Case:
    """Weights, input (B, S, D), which tokens are real (B, S), and what the output is multiplied with, in float64."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    x: Tensor
    valid: Tensor
    weights: Tensor
    top_k: int


def make_case(seed: int, sequences: int, tokens: int, experts: int, top_k: int, padded: float) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # Rounded to float32, so that both sides start from the same numbers.
        return torch.empty(shape).normal_(0.0, 1.0, generator=generator).double()

    return Case(
        router=normal(experts, WIDTH),
        gate_up=normal(experts, 2 * HIDDEN, WIDTH),
        down=normal(experts, WIDTH, HIDDEN),
        x=normal(sequences, tokens, WIDTH),
        valid=torch.rand(sequences, tokens, generator=generator) >= padded,
        weights=normal(sequences, tokens, WIDTH),
        top_k=top_k,
    )


Result = tuple[Tensor, Tensor, Tensor, list[int], float]


def reference(case: Case) -> Result:
    """Output, balance loss, z-loss, choices per expert, and the smallest gap between a chosen score and one not."""
    sequences, tokens, _ = case.x.shape
    experts = len(case.router)
    out = torch.zeros_like(case.x)
    balance, z = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    all_counts, nearest = [0] * experts, float("inf")
    for b in range(sequences):
        real = [s for s in range(tokens) if case.valid[b, s]]
        counts, probability_sum = [0] * experts, torch.zeros(experts, dtype=torch.float64)
        for s in real:
            token = case.x[b, s]
            scores = [case.router[e] @ token for e in range(experts)]
            exponentials = [score.exp() for score in scores]
            partition = sum(exponentials)
            probabilities = [value / partition for value in exponentials]
            ranked = sorted(range(experts), key=lambda e: -scores[e].item())
            chosen = ranked[: case.top_k]
            if case.top_k < experts:
                nearest = min(nearest, (scores[chosen[-1]] - scores[ranked[case.top_k]]).item())
            chosen_sum = sum(probabilities[e] for e in chosen)
            mixed = torch.zeros(WIDTH, dtype=torch.float64)
            for e in chosen:
                gate, up = case.gate_up[e, :HIDDEN] @ token, case.gate_up[e, HIDDEN:] @ token
                hidden = gate / (1 + (-gate).exp()) * up
                mixed = mixed + probabilities[e] / chosen_sum * (case.down[e] @ hidden)
                counts[e] += 1
            out[b, s] = mixed
            probability_sum = probability_sum + torch.stack(probabilities)
            z = z + partition.log() ** 2 / len(real) / sequences
        for e in range(experts):
            if real:
                share = counts[e] / (len(real) * case.top_k)
                balance = balance + experts * share * probability_sum[e] / len(real) / sequences
            all_counts[e] += counts[e]
    return out, balance, z, all_counts, nearest


def reference_gradients(case: Case) -> tuple[dict[str, Tensor], Result]:
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in ("router", "gate_up", "down", "x")}
    result = reference(Case(valid=case.valid, weights=case.weights, top_k=case.top_k, **leaves))
    out, balance, z, _, _ = result
    loss = (out * case.weights).sum() + BALANCE * balance + Z * z
    if loss.requires_grad:
        loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items()}, result


def check(case: Case, dtype: torch.dtype) -> list[int] | None:
    """Compare the block in ``dtype`` with the reference.

    Returns:
        Choices per expert; None if two experts are all but equal: fp32 may prefer the other, and be as right.
    """
    expected, (out, balance, z, counts, nearest) = reference_gradients(case)
    if nearest < 1e-5:
        return None
    experts = len(case.router)
    config = MoEConfig(experts=experts, top_k=case.top_k)
    block = SparseMLP(WIDTH, HIDDEN, config, ExpertShard(), 1.0, 1.0).to(dtype)
    parameters = {"router": block.router.weight, "gate_up": block.experts.gate_up, "down": block.experts.down}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(getattr(case, name))
    x = case.x.to(dtype).requires_grad_()

    own_out, own_losses, own_counts = block(x, case.valid)
    ((own_out * case.weights.to(dtype)).sum() + BALANCE * own_losses[0] + Z * own_losses[1]).backward()

    assert own_counts.tolist() == counts
    assert own_out.dtype == dtype and own_losses.dtype == torch.float32
    assert not own_out[~case.valid].any(), "padding comes out as zero"
    close(own_out, out, "output")
    close(own_losses[0], balance, "balance")
    close(own_losses[1], z, "z")
    for name, tensor in {**parameters, "x": x}.items():
        close(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad, expected[name], f"gradient of {name}")
    return counts


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    # The router works in fp32 whatever the dtype; a rounding there is carried into all the rest.
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected, atol=1e-5 * scale, rtol=0, msg=lambda message: f"{what}: {message}"
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    sequences=st.integers(1, 3),
    tokens=st.integers(1, 6),
    experts=st.integers(1, 6),
    data=st.data(),
    padded=st.sampled_from([0.0, 0.3, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_block_and_all_its_gradients_agree_with_a_plain_loop(
    seed: int, sequences: int, tokens: int, experts: int, data: st.DataObject, padded: float, dtype: torch.dtype
) -> None:
    top_k = data.draw(st.sampled_from(sorted({1, min(2, experts), experts})))
    assume(check(make_case(seed, sequences, tokens, experts, top_k, padded), dtype) is not None)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_agrees_when_one_expert_is_chosen_by_none_and_one_by_all(top_k: int) -> None:
    case = make_case(7, 2, 5, 5, top_k, 0.3)
    case.x[..., 0] = 1.0
    case.router[1, 0], case.router[3, 0] = -12.0, 12.0
    counts = check(case, torch.float32)
    assert counts is not None and counts[1] == 0 and counts[3] == int(case.valid.sum())


def test_agrees_when_a_sequence_is_all_padding() -> None:
    case = make_case(11, 3, 4, 4, 2, 0.3)
    case.valid[1] = False
    assert check(case, torch.float32) is not None


def test_with_nothing_but_padding_output_losses_and_gradients_are_zero() -> None:
    case = make_case(13, 2, 3, 4, 2, 0.0)
    case.valid[:] = False
    assert check(case, torch.float32) == [0, 0, 0, 0]


@pytest.mark.parametrize("top_k", [1, 3])
def test_permuting_tokens_permutes_the_output_and_nothing_else(top_k: int) -> None:
    case = make_case(17, 1, 9, 4, top_k, 0.2)
    block = SparseMLP(WIDTH, HIDDEN, MoEConfig(experts=4, top_k=top_k), ExpertShard(), 1.0, 1.0)
    with torch.no_grad():
        block.router.weight.copy_(case.router)
        block.experts.gate_up.copy_(case.gate_up)
        block.experts.down.copy_(case.down)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        out, losses, counts = block(case.x.float(), case.valid)
        other_out, other_losses, other_counts = block(case.x.float()[:, order], case.valid[:, order])
    torch.testing.assert_close(other_out, out[:, order], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(other_losses, losses, atol=1e-6, rtol=1e-6)
    assert torch.equal(other_counts, counts)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_grouped_linear_and_its_gradients_are_one_product_per_group_empty_ones_too(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(counts), 3, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(len(counts), 4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    grad = torch.randn(sum(counts), 4, dtype=torch.float64, generator=generator)
    out = grouped_linear(rows, weight, ends(counts))
    grad_rows, grad_weight = torch.autograd.grad(out, (rows, weight), grad)
    start = 0
    for expert, count in enumerate(counts):
        part = slice(start, start + count)
        torch.testing.assert_close(out[part], rows[part] @ weight[expert].T)
        torch.testing.assert_close(grad_rows[part], grad[part] @ weight[expert])
        torch.testing.assert_close(grad_weight[expert], grad[part].T @ rows[part])
        start += count
    assert start == len(out)


def test_grouped_linear_passes_the_numeric_gradient_check() -> None:
    rows = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: grouped_linear(r, w, ends([2, 0, 3, 1])), (rows, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 5, 1, 7], [0, 9, 0, 7], [16, 0, 0, 0]])
def test_fused_product_equals_one_product_per_group(
    counts: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(16, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4, 24, 16, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(16, 24, generator=generator).to(dtype)
    looped = grouped_linear(rows, weight, ends(counts))
    looped_gradients = torch.autograd.grad(looped, (rows, weight), grad)
    # The branch of the GPU, with the CPU's version of the same operator.
    monkeypatch.setattr(experts_module, "_fused", lambda rows, weight: True)
    fused = grouped_linear(rows, weight, ends(counts))
    fused_gradients = torch.autograd.grad(fused, (rows, weight), grad)
    direct = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends(counts))
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(fused, looped, **tolerance)
    torch.testing.assert_close(direct, looped, **tolerance)
    for fused_gradient, looped_gradient in zip(fused_gradients, looped_gradients, strict=True):
        torch.testing.assert_close(fused_gradient, looped_gradient, **tolerance)
