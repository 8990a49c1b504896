"""Language decoder in the Qwen3-MoE layout (arXiv:2505.09388)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megamoe.config import DecoderConfig, ModelConfig, MoEConfig
from megamoe.core.packed_batch import PackedBatch
from megamoe.model.attention import Mask, attend, packed_causal_mask, segment_positions
from megamoe.model.batch import once_per_batch, valid_tokens
from megamoe.model.layers import Linear, RMSNorm, SwiGLU
from megamoe.model.moe import SparseMLP
from megamoe.model.parameter import ExpertShard
from megamoe.model.pipeline_layer import BlockLayer, BlockOutput, SequenceShape, State


@dataclass
class KVCache:
    """Keys and values of one block: room for as many positions as ``k_BGLd`` has, of which ``filled`` are in use."""

    k_BGLd: Tensor
    v_BGLd: Tensor
    filled: int = 0

    def extend(self, k_BGSd: Tensor, v_BGSd: Tensor) -> tuple[Tensor, Tensor]:
        """Append S positions and return all positions in use."""
        start, stop = self.filled, self.filled + k_BGSd.shape[2]
        self.k_BGLd[:, :, start:stop] = k_BGSd
        self.v_BGLd[:, :, start:stop] = v_BGSd
        self.filled = stop
        return self.k_BGLd[:, :, :stop], self.v_BGLd[:, :, :stop]


Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of each position's angles, (B, 1, L, d / 2) each."""


def rotary(positions_BL: Tensor, config: DecoderConfig, dtype: torch.dtype) -> Rotary:
    """Compute the angles of rotary position embedding (arXiv:2104.09864) in fp32. All blocks share them."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half, device=positions_BL.device, dtype=torch.float32) / half)
    angle_B1Lh = (positions_BL.unsqueeze(-1).float() * frequency).unsqueeze(1)
    return angle_B1Lh.cos().to(dtype), angle_B1Lh.sin().to(dtype)


def rotate(x_BHLd: Tensor, angles: Rotary) -> Tensor:
    """Rotate queries or keys by the angles of their positions, in the halves convention."""
    cos, sin = angles
    first, second = x_BHLd.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class DecoderAttention(nn.Module):
    """Grouped-query attention with norms on queries and keys."""

    def __init__(self, config: DecoderConfig, std: float, out_std: float):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q = Linear(config.width, config.heads * config.head_dim, std, bias=False)
        self.k = Linear(config.width, config.kv_heads * config.head_dim, std, bias=False)
        self.v = Linear(config.width, config.kv_heads * config.head_dim, std, bias=False)
        self.out = Linear(config.heads * config.head_dim, config.width, out_std, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x_BLD: Tensor, angles: Rotary, mask: Mask | None, cache: KVCache | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D). With a cache, each token also sees the keys and values of earlier positions."""
        B, L, _ = x_BLD.shape
        q = self.q_norm(self.q(x_BLD).view(B, L, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k(x_BLD).view(B, L, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v(x_BLD).view(B, L, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.out(attend(q, k, v, mask).transpose(1, 2).reshape(B, L, -1))

    def new_cache(self, rows: int, length: int) -> KVCache:
        """Make an empty cache for ``length`` positions of each row."""
        shape = (rows, self.kv_heads, length, self.head_dim)
        return KVCache(self.k.weight.new_zeros(shape), self.k.weight.new_zeros(shape))

    def projection_flops(self, tokens: int) -> int:
        """Forward FLOPs of the four linear maps."""
        return sum(linear.flops(tokens) for linear in (self.q, self.k, self.v, self.out))

    def score_flops(self, tokens: int, segment: float) -> float:
        """Forward FLOPs of scores and weighted values. Causal: a token sees half of its segment on average."""
        return 4 * (segment / 2) * (self.heads * self.head_dim) * tokens


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
    ) -> BlockOutput:
        """Transform L tokens per sequence. Tokens that are not valid are padding."""
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), angles, mask, cache)
        normed_BLD = self.norm2(x_BLD)
        if isinstance(self.mlp, SparseMLP):
            out_BLD, losses_2, counts_E = self.mlp(normed_BLD, valid_BL)
            return x_BLD + out_BLD, losses_2, counts_E
        return x_BLD + self.mlp(normed_BLD), None, None

    def flops(self, tokens: int, segment: float) -> float:
        """Forward FLOPs for this many tokens in segments of this mean length."""
        products = self.attention.projection_flops(tokens) + self.mlp.flops(tokens)
        return products + self.attention.score_flops(tokens, segment)


class DecoderLayer(BlockLayer):
    """A decoder block on the packed sequence."""

    block: DecoderBlock

    def __init__(self, model: ModelConfig, index: int, shard: ExpertShard):
        super().__init__(DecoderBlock(model.decoder, model.moe, index, shard, model.init_std))
        self.kernel, self.decoder = model.attention, model.decoder

    def forward(self, state: State, kernel: str | None = None, cache: KVCache | None = None) -> State:
        """Transform the activations, S = L.

        Args:
            state: State whose activations are those of the packed sequence.
            kernel: Attention kernel; default the one of the config.
            cache: Filled with the keys and values of the sequence.
        """
        hidden_BLD, losses_2, text_B3L = state
        angles = self._angles(text_B3L, hidden_BLD.dtype)
        mask = packed_causal_mask(text_B3L, kernel or self.kernel)
        hidden_BLD, losses_2 = self.step(losses_2, hidden_BLD, angles, valid_tokens(text_B3L), mask, cache)
        return hidden_BLD, losses_2, text_B3L

    def decode(self, hidden_B1D: Tensor, angles: Rotary, alive_B1: Tensor, mask: Mask, cache: KVCache) -> Tensor:
        """Transform one more token per row, (B, 1, D) -> (B, 1, D). Rows that are not alive visit no expert."""
        hidden_B1D, _, _ = self.block(hidden_B1D, angles, alive_B1, mask, cache)
        return hidden_B1D

    def flops(self, shape: SequenceShape) -> float:
        """Forward FLOPs for one packed sequence."""
        return self.block.flops(shape.length, shape.segment)

    def _angles(self, text_B3L: Tensor, dtype: torch.dtype) -> Rotary:
        def compute() -> Rotary:
            return rotary(segment_positions(PackedBatch.of(text_B3L).segments), self.decoder, dtype)

        return once_per_batch(text_B3L, dtype, compute)
