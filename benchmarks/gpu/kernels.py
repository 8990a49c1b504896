"""Kernels that only a GPU runs, beside plain versions in fp32: values, gradients, and time."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.context import Context
from megamoe.config import MoEConfig
from megamoe.core.packed_batch import PackedBatch
from megamoe.model import attention, experts, moe
from megamoe.model.parameter import ExpertShard

BF16 = 2e-2  # of the largest value: a result of bf16 has 8 bits, sums are in fp32


def measure(context: Context) -> None:
    """Record errors relative to the largest value, and seconds of kernel and plain version."""
    torch.set_float32_matmul_precision("highest")
    good = [_grouped(context, name, counts, widths) for name, counts, widths in _cases(context.tiny)]
    good.append(_padding(context))
    good += [_attention(context, dtype) for dtype in (torch.bfloat16, torch.float32)]
    context.record("holds", all(good))


def _cases(tiny: bool) -> list[tuple[str, list[int], tuple[int, int]]]:
    rows, count = (64, 4) if tiny else (32768, 16)
    decoder = (16, 24) if tiny else (1024, 1792)
    harmonic = sum(1 / (i + 1) for i in range(count))
    zipf = [int(rows / harmonic / (i + 1)) for i in range(count)]
    zipf[0] += rows - sum(zipf)
    half = [0 if i % 2 else 2 * rows // count for i in range(count)]
    return [
        ("grouped product, equal experts", [rows // count] * count, decoder),
        ("grouped product, Zipf", zipf, decoder),
        ("grouped product, every second expert empty", half, decoder),
        ("grouped product, one expert takes all", [0, rows, *[0] * (count - 2)], decoder),
        ("grouped product, few rows each", [i % 3 for i in range(count)], decoder),
        ("grouped product, widths no multiple of 8: the loop", [rows // count] * count, (decoder[0] + 2, decoder[1] + 4)),
    ]


def _grouped(context: Context, name: str, counts: list[int], widths: tuple[int, int]) -> bool:
    """The fused product and its gradients against one product per group in fp32."""
    inner, outer = widths
    generator = torch.Generator(context.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=context.device, generator=generator).to(torch.bfloat16)

    rows = normal(sum(counts), inner).requires_grad_()
    weight = (normal(len(counts), outer, inner) / inner**0.5).detach().requires_grad_()
    grad = normal(sum(counts), outer)
    ends = torch.tensor(counts, device=context.device).cumsum(0).to(torch.int32)
    aligned = not any(width % 8 for width in widths)
    # On a CPU the same operator is there, but not chosen.
    forced = mock.patch.object(experts, "_fused", lambda *_: aligned) if not context.cuda else mock.MagicMock()
    with forced:
        fused = experts._fused(rows, weight)

        def run() -> tuple[Tensor, ...]:
            out = experts.grouped_linear(rows, weight, ends)
            return (out.detach(), *torch.autograd.grad(out, (rows, weight), grad))

        found = run()
        errors = _errors(found, _plain(rows, weight, grad, counts))
        empty = all(not found[2][i].any() for i, count in enumerate(counts) if not count)
        seconds = context.seconds(run)
    flops = 6.0 * sum(counts) * inner * outer
    dense = context.seconds(lambda: _dense(rows, weight, grad))
    good = fused == aligned and empty and max(errors) <= BF16
    context.record(
        name,
        {"fused": fused, "errors": errors, "gradient of empty experts is zero": empty, "holds": good}
        | {"seconds": seconds, "flops_per_second": flops / seconds, "over_dense": seconds / dense},
    )
    return good


def _plain(rows: Tensor, weight: Tensor, grad: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    rows, weight, grad = rows.detach().float(), weight.detach().float(), grad.float()
    out, grad_rows, grad_weight = grad.clone(), torch.empty_like(rows), torch.zeros_like(weight)
    start = 0
    for i, count in enumerate(counts):
        part = slice(start, start + count)
        out[part], grad_rows[part] = rows[part] @ weight[i].T, grad[part] @ weight[i]
        grad_weight[i] = grad[part].T @ rows[part]
        start += count
    return out, grad_rows, grad_weight


def _dense(rows: Tensor, weight: Tensor, grad: Tensor) -> None:
    """The same FLOPs as one product forward and two backward."""
    F.linear(rows, weight[0])
    grad @ weight[0]
    grad.t() @ rows


def _padding(context: Context) -> bool:
    """A block in fp32 whose padding visits its experts, against one that leaves padding out."""
    width, hidden, tokens = (16, 8, 32) if context.tiny else (256, 128, 2048)
    config = MoEConfig(experts=8, top_k=2)
    with context.device:
        block = moe.SparseMLP(width, hidden, config, ExpertShard(), 1.0, 1.0)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.normal_(0, width**-0.5)
        x = torch.randn(4, tokens, width).requires_grad_()
        valid = torch.arange(tokens).expand(4, -1) < torch.tensor([[tokens], [tokens // 2], [1], [0]])

    def run(keeps: bool) -> tuple[Tensor, ...]:
        block.zero_grad()
        x.grad = None
        with mock.patch.object(moe, "_keeps_padding", lambda _: keeps):
            out, losses, counts = block(x, valid)
        (out.square().sum() + losses.sum()).backward()
        return out.detach(), losses.detach(), counts, x.grad, *(p.grad for p in block.parameters())

    errors = _errors(run(True), run(False))
    good = max(errors) <= 1e-5
    context.record("padding visits its experts and counts nothing", {"errors": errors, "holds": good})
    return good


def _attention(context: Context, dtype: torch.dtype) -> bool:
    """The block mask against the dense one, within segments of 256 tokens that a picture and its caption take."""
    B, L, H, G, d = (1, 256, 4, 2, 16) if context.tiny else (4, 2048, 16, 4, 64)
    generator = torch.Generator(context.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=context.device, dtype=dtype, generator=generator)

    q, k, v, grad = normal(B, H, L, d), normal(B, G, L, d), normal(B, G, L, d), normal(B, H, L, d)
    text = torch.zeros(B, 3, L, dtype=torch.int64, device=context.device)
    segments = PackedBatch.of(text).segments
    segments[:] = torch.arange(L, device=context.device) // (L // 8) + 1
    segments[:, -L // 16 :] = 0
    leaves = [x.requires_grad_(context.cuda) for x in (q, k, v)]

    def run(kernel: str) -> tuple[Tensor, ...]:
        mask = attention.packed_causal_mask(text.clone(), kernel)
        out = attention.attend(leaves[0], leaves[1], leaves[2], mask)
        if not context.cuda:  # on a CPU flex attention has no backward
            return (out.detach(),)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    with torch.set_grad_enabled(context.cuda):
        errors = _errors(run("flex"), run("sdpa"))
        seconds = {kernel: context.seconds(lambda kernel=kernel: run(kernel)) for kernel in ("flex", "sdpa")}  # type: ignore[misc]
        masks = {name: context.seconds(_maker(text, name)) for name in ("flex", "sdpa")}
    good = max(errors) <= (BF16 if dtype == torch.bfloat16 else 1e-4)
    name = str(dtype).removeprefix("torch.")
    context.record(
        f"attention in {name}, block mask against dense mask",
        {"errors": errors, "holds": good, "seconds": seconds, "seconds of the mask alone": masks},
    )
    return good


def _maker(text: Tensor, kernel: str) -> Callable[[], object]:
    return lambda: attention.packed_causal_mask(text.clone(), kernel)


def _errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """Largest difference of each tensor, over the largest value expected."""
    errors = []
    for one, other in zip(found, expected, strict=True):
        scale = other.double().abs().max().clamp_min(1e-30) if other.numel() else torch.ones(())
        error = (one.double() - other.double()).abs().max() if other.numel() else torch.zeros(())
        errors.append(float(error / scale))
    return errors
