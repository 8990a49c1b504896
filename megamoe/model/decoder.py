"""Language decoder in the Qwen3-MoE layout (arXiv:2505.09388)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamoe.config import DecoderConfig, MoEConfig
from megamoe.model.attention import Mask, attend
from megamoe.model.moe import SparseMLP
from megamoe.model.parameter import ExpertShard, matrix, vector


@dataclass
class KVCache:
    """Keys and values of one block for up to ``length`` positions; ``filled`` of them are there."""

    k_BGLd: Tensor
    v_BGLd: Tensor
    filled: int = 0

    def extend(self, k_BGSd: Tensor, v_BGSd: Tensor) -> tuple[Tensor, Tensor]:
        """Add S positions and return all that are there."""
        start, stop = self.filled, self.filled + k_BGSd.shape[2]
        self.k_BGLd[:, :, start:stop] = k_BGSd
        self.v_BGLd[:, :, start:stop] = v_BGSd
        self.filled = stop
        return self.k_BGLd[:, :, :stop], self.v_BGLd[:, :, :stop]


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467), computed in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = vector(width, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


class Projection(nn.Module):
    """Linear map without a bias."""

    def __init__(self, fan_in: int, fan_out: int, std: float):
        super().__init__()
        self.weight = matrix(fan_out, fan_in, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., fan_in) -> (..., fan_out)"""
        return F.linear(x, self.weight)


Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of each position's angles, (B, 1, L, d / 2) each."""


def rotary(positions_BL: Tensor, config: DecoderConfig, dtype: torch.dtype) -> Rotary:
    """Angles of rotary position embedding (arXiv:2104.09864), computed in fp32; the same for all blocks."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half, device=positions_BL.device, dtype=torch.float32) / half)
    angle_B1Lh = (positions_BL.unsqueeze(-1).float() * frequency).unsqueeze(1)
    return angle_B1Lh.cos().to(dtype), angle_B1Lh.sin().to(dtype)


def rotate(x_BHLd: Tensor, angles: Rotary) -> Tensor:
    """Rotate queries or keys by the angles of their positions, halves convention."""
    cos, sin = angles
    first, second = x_BHLd.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class DecoderAttention(nn.Module):
    """Grouped-query attention with norms on queries and keys."""

    def __init__(self, config: DecoderConfig, std: float, out_std: float):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q = Projection(config.width, config.heads * config.head_dim, std)
        self.k = Projection(config.width, config.kv_heads * config.head_dim, std)
        self.v = Projection(config.width, config.kv_heads * config.head_dim, std)
        self.out = Projection(config.heads * config.head_dim, config.width, out_std)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x_BLD: Tensor, angles: Rotary, mask: Mask | None, cache: KVCache | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D). With a cache, keys and values of earlier positions are seen too."""
        B, L, _ = x_BLD.shape
        q = self.q_norm(self.q(x_BLD).view(B, L, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k(x_BLD).view(B, L, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v(x_BLD).view(B, L, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.out(attend(q, k, v, mask).transpose(1, 2).reshape(B, L, -1))


class SwiGLU(nn.Module):
    """Dense MLP with a gated SiLU (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, std: float, out_std: float):
        super().__init__()
        self.gate = Projection(width, hidden, std)
        self.up = Projection(width, hidden, std)
        self.down = Projection(hidden, width, out_std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DecoderBlock(nn.Module):
    """Pre-norm block: attention, then a dense or sparse MLP."""

    def __init__(self, config: DecoderConfig, moe: MoEConfig, index: int, shard: ExpertShard, std: float):
        super().__init__()
        out_std = std / (2 * config.depth) ** 0.5
        self.norm1 = RMSNorm(config.width, config.norm_eps)
        self.attention = DecoderAttention(config, std, out_std)
        self.norm2 = RMSNorm(config.width, config.norm_eps)
        self.mlp: SparseMLP | SwiGLU
        if config.is_sparse(index):
            self.mlp = SparseMLP(config.width, config.expert_width, moe, shard, std, out_std)
        else:
            self.mlp = SwiGLU(config.width, config.mlp_width, std, out_std)

    def forward(
        self, x_BLD: Tensor, angles: Rotary, valid_BL: Tensor, mask: Mask | None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Transform L tokens per sequence; those that are not valid are padding.

        Returns:
            (B, L, D), and of a sparse block its losses (2,) and choices per expert (E,), else None twice.
        """
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), angles, mask, cache)
        normed_BLD = self.norm2(x_BLD)
        if isinstance(self.mlp, SparseMLP):
            out_BLD, losses_2, counts_E = self.mlp(normed_BLD, valid_BL)
            return x_BLD + out_BLD, losses_2, counts_E
        return x_BLD + self.mlp(normed_BLD), None, None
