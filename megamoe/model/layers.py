"""Plain layers that the blocks of both towers and the projector are made of.

Each layer counts its forward FLOPs: two per multiply-add of a matrix product, and two per bias. Norms and activations
count nothing, as in the usual model-FLOPs convention (arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megamoe.model.parameter import matrix, vector


class Linear(nn.Module):
    """Linear map, with a bias as in SigLIP and LLaVA, or without as in Qwen3."""

    def __init__(self, fan_in: int, fan_out: int, std: float, bias: bool):
        super().__init__()
        self.weight = matrix(fan_out, fan_in, std=std)
        self.bias = vector(fan_out, 0.0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., fan_in) -> (..., fan_out)"""
        return F.linear(x, self.weight, self.bias)

    def flops(self, tokens: int) -> int:
        """Forward FLOPs for this many tokens."""
        return 2 * tokens * sum(parameter.numel() for parameter in self.parameters())


class LayerNorm(nn.Module):
    """Layer norm over the last dimension."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = vector(width, 1.0)
        self.bias = vector(width, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467), computed in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = vector(width, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


class GeluMLP(nn.Module):
    """Dense MLP with a tanh-approximated GELU and biases, as in SigLIP."""

    def __init__(self, width: int, hidden: int, std: float, out_std: float):
        super().__init__()
        self.fc1 = Linear(width, hidden, std, bias=True)
        self.fc2 = Linear(hidden, width, out_std, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

    def flops(self, tokens: int) -> int:
        """Forward FLOPs for this many tokens."""
        return self.fc1.flops(tokens) + self.fc2.flops(tokens)


class SwiGLU(nn.Module):
    """Dense MLP with a gated SiLU (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, std: float, out_std: float):
        super().__init__()
        self.gate = Linear(width, hidden, std, bias=False)
        self.up = Linear(width, hidden, std, bias=False)
        self.down = Linear(hidden, width, out_std, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def flops(self, tokens: int) -> int:
        """Forward FLOPs for this many tokens."""
        return self.gate.flops(tokens) + self.up.flops(tokens) + self.down.flops(tokens)
