"""SwiGLU experts as one grouped matrix product over rows that are sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamoe.model.parameter import ExpertShard, expert_matrix


class Experts(nn.Module):
    """The experts of one block that this rank holds.

    ``gate_up`` is (e, 2F, D) and ``down`` is (e, D, F), as ``transformers`` lays out Qwen3-MoE.
    """

    def __init__(self, width: int, hidden: int, experts: int, shard: ExpertShard, std: float, out_std: float):
        super().__init__()
        self.gate_up = expert_matrix(experts, shard, 2 * hidden, width, std=std)
        self.down = expert_matrix(experts, shard, width, hidden, std=out_std)

    def forward(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        """Apply expert i to its ``counts[i]`` rows; rows are in the order of the experts.

        Args:
            rows_ND: Rows sorted by expert; N = sum(counts).
            counts: Rows per expert held here, length e.

        Returns:
            (N, D)
        """
        gate_NF, up_NF = grouped_linear(rows_ND, self.gate_up, counts).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate_NF) * up_NF, self.down, counts)


def grouped_linear(rows_NI: Tensor, weight_eOI: Tensor, counts: list[int]) -> Tensor:
    """``rows @ weight[i].T`` for the ``counts[i]`` rows of each expert i, in order. Returns (N, O)."""
    result: Tensor = _GroupedLinear.apply(rows_NI, weight_eOI, counts)
    return result


class _GroupedLinear(torch.autograd.Function):
    """One fused kernel on CUDA in bf16; elsewhere one GEMM per expert written in place (no concatenation)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        return _rows_times(rows, weight.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = _rows_times(grad, weight, ctx.counts)
        if _fused(rows):
            grad_weight = F.grouped_mm(grad.t(), rows, offs=_ends(ctx.counts, rows.device))
        else:
            grad_weight = torch.empty_like(weight)
            start = 0
            for expert, count in enumerate(ctx.counts):
                torch.mm(grad[start : start + count].t(), rows[start : start + count], out=grad_weight[expert])
                start += count
        return grad_rows, grad_weight, None


def _rows_times(rows_NI: Tensor, matrices_eIO: Tensor, counts: list[int]) -> Tensor:
    if _fused(rows_NI):
        return F.grouped_mm(rows_NI, matrices_eIO, offs=_ends(counts, rows_NI.device))
    out = rows_NI.new_empty(rows_NI.shape[0], matrices_eIO.shape[2])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            torch.mm(rows_NI[start : start + count], matrices_eIO[expert], out=out[start : start + count])
        start += count
    return out


def _fused(rows: Tensor) -> bool:
    # grouped_mm wants rows aligned to 16 bytes, and its CPU version is a loop with concatenation.
    return rows.is_cuda and rows.dtype == torch.bfloat16


def _ends(counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
