"""Vision encoder in the SigLIP layout (arXiv:2303.15343). Its blocks can be sparse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megamoe.config import ModelConfig, MoEConfig, VisionConfig
from megamoe.model.attention import attend
from megamoe.model.batch import patches_in_use
from megamoe.model.layers import GeluMLP, LayerNorm, Linear
from megamoe.model.moe import SparseMLP
from megamoe.model.parameter import ExpertShard, matrix
from megamoe.model.pipeline_layer import BlockLayer, BlockOutput, PipelineLayer, SequenceShape, State


class PatchEmbedding(nn.Module):
    """Pictures -> patch tokens: a convolution with stride = patch size, plus learned positions."""

    def __init__(self, config: VisionConfig, std: float):
        super().__init__()
        self.patch_size = config.patch_size
        self.patch = Linear(3 * config.patch_size**2, config.width, std, bias=True)
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
        self.q = Linear(config.width, config.width, std, bias=True)
        self.k = Linear(config.width, config.width, std, bias=True)
        self.v = Linear(config.width, config.width, std, bias=True)
        self.out = Linear(config.width, config.width, out_std, bias=True)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """(N, P, D) -> (N, P, D). The N pictures do not see each other."""
        N, P, D = x_NPD.shape
        q, k, v = (
            project(x_NPD).view(N, P, self.heads, D // self.heads).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        return self.out(attend(q, k, v, None).transpose(1, 2).reshape(N, P, D))

    def projection_flops(self, tokens: int) -> int:
        """Forward FLOPs of the four linear maps."""
        return sum(linear.flops(tokens) for linear in (self.q, self.k, self.v, self.out))

    def score_flops(self, tokens: int, patches: int) -> int:
        """Forward FLOPs of scores and weighted values. Each token sees all patches of its picture."""
        return 4 * patches * self.out.weight.shape[0] * tokens


class VisionBlock(nn.Module):
    """Pre-norm transformer block over the patches of each picture."""

    def __init__(self, config: VisionConfig, moe: MoEConfig, index: int, shard: ExpertShard, std: float):
        super().__init__()
        out_std = std / (2 * config.depth) ** 0.5
        self.patches = config.patches
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attention = VisionAttention(config, std, out_std)
        self.norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp: SparseMLP | GeluMLP
        if config.is_sparse(index):
            self.mlp = SparseMLP(config.width, config.expert_width, moe, shard, std, out_std)
        else:
            self.mlp = GeluMLP(config.width, config.mlp_width, std, out_std)

    def forward(self, x_BSD: Tensor, valid_BS: Tensor) -> BlockOutput:
        """Transform S = I*P patch tokens per sequence. Tokens that are not valid belong to unused picture slots."""
        B, S, D = x_BSD.shape
        pictures_NPD = self.norm1(x_BSD).view(B * S // self.patches, self.patches, D)
        x_BSD = x_BSD + self.attention(pictures_NPD).view(B, S, D)
        normed_BSD = self.norm2(x_BSD)
        if isinstance(self.mlp, SparseMLP):
            out_BSD, losses_2, counts_E = self.mlp(normed_BSD, valid_BS)
            return x_BSD + out_BSD, losses_2, counts_E
        return x_BSD + self.mlp(normed_BSD), None, None

    def flops(self, tokens: int) -> int:
        """Forward FLOPs for this many patch tokens."""
        products = self.attention.projection_flops(tokens) + self.mlp.flops(tokens)
        return products + self.attention.score_flops(tokens, self.patches)


class PatchEmbeddingLayer(PipelineLayer):
    """The first layer: pixels of all picture slots -> patch tokens."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.embed = PatchEmbedding(model.vision, model.init_std)
        self.patches = model.vision.patches

    def forward(self, batch: tuple[Tensor, Tensor]) -> State:
        """uint8 (B, I, height, width, 3), int64 (B, 3, L) -> state, S = I*P."""
        pixels, text_B3L = batch
        B, slots = pixels.shape[:2]
        patches = self.embed(pixels.flatten(0, 1))
        # A leaf with a gradient: a first stage without a sparse block still gets one back from the next stage.
        losses_2 = torch.zeros(2, dtype=torch.float32, device=patches.device, requires_grad=torch.is_grad_enabled())
        return patches.reshape(B, slots * patches.shape[1], -1), losses_2, text_B3L

    def flops(self, shape: SequenceShape) -> int:
        """Forward FLOPs for one packed sequence."""
        return self.embed.patch.flops(shape.patch_tokens)


class VisionLayer(BlockLayer):
    """A vision block on the patch tokens."""

    block: VisionBlock

    def __init__(self, model: ModelConfig, index: int, shard: ExpertShard, image_token: int):
        super().__init__(VisionBlock(model.vision, model.moe, index, shard, model.init_std))
        self.image_token = image_token

    def forward(self, state: State) -> State:
        """Transform the activations, S = I*P."""
        hidden_BSD, losses_2, text_B3L = state
        valid_BS = patches_in_use(text_B3L, self.image_token, hidden_BSD.shape[1])
        hidden_BSD, losses_2 = self.step(losses_2, hidden_BSD, valid_BS)
        return hidden_BSD, losses_2, text_B3L

    def flops(self, shape: SequenceShape) -> int:
        """Forward FLOPs for one packed sequence."""
        return self.block.flops(shape.patch_tokens)
