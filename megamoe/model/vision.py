"""Vision encoder in the SigLIP layout (arXiv:2303.15343). Its blocks can be sparse."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megamoe.config import MoEConfig, VisionConfig
from megamoe.model.attention import attend
from megamoe.model.moe import SparseMLP
from megamoe.model.parameter import ExpertShard, matrix, vector


class Linear(nn.Module):
    """Linear map with a bias, as SigLIP and LLaVA have everywhere."""

    def __init__(self, fan_in: int, fan_out: int, std: float):
        super().__init__()
        self.weight = matrix(fan_out, fan_in, std=std)
        self.bias = vector(fan_out, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., fan_in) -> (..., fan_out)"""
        return F.linear(x, self.weight, self.bias)


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


class PatchEmbedding(nn.Module):
    """Pictures -> patch tokens: a convolution with stride = patch size, plus learned positions."""

    def __init__(self, config: VisionConfig, std: float):
        super().__init__()
        self.patch_size = config.patch_size
        self.patch = Linear(3 * config.patch_size**2, config.width, std)
        self.position = matrix(config.patches, config.width, std=std)

    def forward(self, pixels_NHWC: Tensor) -> Tensor:
        """uint8 (N, height, width, 3) -> (N, P, D). Pixels are scaled to [-1, 1] as SigLIP does."""
        N, height, width, _ = pixels_NHWC.shape
        p = self.patch_size
        x = pixels_NHWC.to(self.patch.weight.dtype) / 127.5 - 1.0
        x = x.view(N, height // p, p, width // p, p, 3)
        # Channel, row, column: the order of a convolution weight flattened.
        patches = x.permute(0, 1, 3, 5, 2, 4).reshape(N, (height // p) * (width // p), 3 * p * p)
        return self.patch(patches) + self.position


class VisionAttention(nn.Module):
    """Full attention among the patches of one picture."""

    def __init__(self, config: VisionConfig, std: float, out_std: float):
        super().__init__()
        self.heads = config.heads
        self.q = Linear(config.width, config.width, std)
        self.k = Linear(config.width, config.width, std)
        self.v = Linear(config.width, config.width, std)
        self.out = Linear(config.width, config.width, out_std)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """(N, P, D) -> (N, P, D); N pictures do not see each other."""
        N, P, D = x_NPD.shape
        q, k, v = (
            project(x_NPD).view(N, P, self.heads, D // self.heads).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        return self.out(attend(q, k, v, None).transpose(1, 2).reshape(N, P, D))


class VisionMLP(nn.Module):
    """Dense MLP with tanh-approximated GELU."""

    def __init__(self, config: VisionConfig, std: float, out_std: float):
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_width, std)
        self.fc2 = Linear(config.mlp_width, config.width, out_std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    """Pre-norm transformer block over the patches of each picture."""

    def __init__(self, config: VisionConfig, moe: MoEConfig, index: int, shard: ExpertShard, std: float):
        super().__init__()
        out_std = std / (2 * config.depth) ** 0.5
        self.patches = config.patches
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attention = VisionAttention(config, std, out_std)
        self.norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp: SparseMLP | VisionMLP
        if config.is_sparse(index):
            self.mlp = SparseMLP(config.width, config.expert_width, moe, shard, std, out_std)
        else:
            self.mlp = VisionMLP(config, std, out_std)

    def forward(self, x_BSD: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Transform S = I*P patch tokens per sequence; those that are not valid belong to unused picture slots.

        Returns:
            (B, S, D), and of a sparse block its losses (2,) and choices per expert (E,), else None twice.
        """
        B, S, D = x_BSD.shape
        pictures_NPD = self.norm1(x_BSD).view(B * S // self.patches, self.patches, D)
        x_BSD = x_BSD + self.attention(pictures_NPD).view(B, S, D)
        normed_BSD = self.norm2(x_BSD)
        if isinstance(self.mlp, SparseMLP):
            out_BSD, losses_2, counts_E = self.mlp(normed_BSD, valid_BS)
            return x_BSD + out_BSD, losses_2, counts_E
        return x_BSD + self.mlp(normed_BSD), None, None
