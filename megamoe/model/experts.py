"""SwiGLU experts as one grouped matrix product over rows that are sorted by expert."""

from __future__ import annotations

from itertools import pairwise
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

    def forward(self, rows_ND: Tensor, ends_e: Tensor) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows_ND: Rows sorted by expert.
            ends_e: int32, end of the rows of each expert held here; the last is N.

        Returns:
            (N, D)
        """
        gate_NF, up_NF = grouped_linear(rows_ND, self.gate_up, ends_e).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate_NF) * up_NF, self.down, ends_e)

    def flops(self, rows: int) -> int:
        """Forward FLOPs for this many rows, whichever experts they visit."""
        return 2 * rows * (self.gate_up[0].numel() + self.down[0].numel())


def grouped_linear(rows_NI: Tensor, weight_eOI: Tensor, ends_e: Tensor) -> Tensor:
    """Return ``rows @ weight[i].T`` (N, O), where the rows of group i end before ``ends_e[i]`` (int32)."""
    result: Tensor = _GroupedLinear.apply(rows_NI, weight_eOI, ends_e)
    return result


class _GroupedLinear(torch.autograd.Function):
    """One fused kernel on CUDA in bf16; elsewhere one GEMM per expert written in place (no concatenation)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return _rows_times(rows, weight.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = _rows_times(grad, weight, ends)
        if _fused(rows, weight):
            grad_weight = F.grouped_mm(grad.t(), rows, offs=ends)
        else:
            grad_weight = torch.empty_like(weight)
            for expert, group in enumerate(_groups(ends)):
                torch.mm(grad[group].t(), rows[group], out=grad_weight[expert])
        return grad_rows, grad_weight, None


def _rows_times(rows_NI: Tensor, matrices_eIO: Tensor, ends_e: Tensor) -> Tensor:
    if _fused(rows_NI, matrices_eIO):
        return F.grouped_mm(rows_NI, matrices_eIO, offs=ends_e)
    out = rows_NI.new_empty(rows_NI.shape[0], matrices_eIO.shape[2])
    for expert, group in enumerate(_groups(ends_e)):
        if group.stop > group.start:
            torch.mm(rows_NI[group], matrices_eIO[expert], out=out[group])
    return out


def _groups(ends: Tensor) -> list[slice]:
    """Return the rows of each group. On CUDA this waits for the device; the fused kernel does not."""
    stops = ends.tolist()
    return [slice(start, stop) for start, stop in pairwise([0, *stops])]


def _fused(rows: Tensor, weight: Tensor) -> bool:
    # The CPU version of grouped_mm is a loop with concatenation. The CUDA kernel needs every row of inputs, weights and
    # results to begin at a multiple of 16 bytes, so both widths must be multiples of 8.
    return rows.is_cuda and rows.dtype == torch.bfloat16 and not any(width % 8 for width in weight.shape[1:])
