"""The model as a list of layers, each a function from a tuple of tensors to a tuple of tensors.

Between layers travel ``(hidden_BSD, losses_2, text_B3L)``: activations of the tower at hand, the auxiliary losses summed
over the sparse blocks so far (fp32), and the packed text (ids, segment ids, labels; integers, no gradient). A pipeline cuts
the list anywhere; nothing else has to cross a cut, so no stage but the first reads data. What has a gradient comes first:
DeepSpeed 0.19.8 reuses its receive buffers by position for activations and gradients and does not look at the type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamoe.config import Config, ModelConfig, MoEConfig
from megamoe.model.attention import packed_causal_mask, segment_positions
from megamoe.model.batch import labelled_positions, once_per_batch, patches_in_use
from megamoe.model.decoder import DecoderBlock, Projection, RMSNorm, rotary
from megamoe.model.parameter import ExpertShard, initialize, matrix
from megamoe.model.vision import LayerNorm, Linear, PatchEmbedding, VisionBlock

State = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LayerSpec:
    """A layer that is not built yet: its global name, whether it has experts, and how to build this rank's part."""

    name: str
    sparse: bool
    build: Callable[[ExpertShard], nn.Module]


def layer_specs(model: ModelConfig, image_token: int) -> list[LayerSpec]:
    """All layers, in order. ``image_token`` is the id that stands where a picture's patches go."""
    vision, decoder, moe, std = model.vision, model.decoder, model.moe, model.init_std

    def vision_block(index: int, shard: ExpertShard) -> nn.Module:
        return VisionLayer(VisionBlock(vision, moe, index, shard, std), model, image_token)

    def decoder_block(index: int, shard: ExpertShard) -> nn.Module:
        return DecoderLayer(DecoderBlock(decoder, moe, index, shard, std), model)

    specs = [LayerSpec("vision.embed", False, lambda _: PictureLayer(model))]
    for i in range(vision.depth):
        specs.append(LayerSpec(f"vision.blocks.{i}", vision.is_sparse(i), partial(vision_block, i)))
    specs.append(LayerSpec("merge", False, lambda _: MergeLayer(model, image_token)))
    for i in range(decoder.depth):
        specs.append(LayerSpec(f"decoder.blocks.{i}", decoder.is_sparse(i), partial(decoder_block, i)))
    specs.append(LayerSpec("head", False, lambda _: HeadLayer(model)))
    return specs


def named_parameters(layer_name: str, layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a layer under the names that checkpoints use on every layout."""
    for local_name, parameter in layer.named_parameters():
        yield f"{layer_name}.{local_name.removeprefix('block.')}", parameter


def build_layer(spec: LayerSpec, shard: ExpertShard, seed: int | None) -> nn.Module:
    """Build this rank's part of a layer with its initial weights; without a seed they are left unset, for a load."""
    layer = spec.build(shard)
    if seed is not None:
        for name, parameter in named_parameters(spec.name, layer):
            initialize(name, parameter, seed)
    return layer


class Stack(nn.Module):
    """All layers in one process (or all of a rank's part, without a pipeline)."""

    def __init__(self, specs: list[LayerSpec], shard: ExpertShard, seed: int | None):
        super().__init__()
        self.specs = specs
        self.layers = nn.ModuleList(build_layer(spec, shard, seed) for spec in specs)

    def forward(self, pixels: Tensor, text_B3L: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, I, height, width, 3), int64 (B, 3, L) -> summed caption loss (), auxiliary losses (2,)."""
        state: tuple[Tensor, ...] = (pixels, text_B3L)
        for layer in self.layers:
            state = layer(state)
        total, losses = state
        return total, losses


class SparseLayer(nn.Module):
    """What the layers around a block share: auxiliary losses, expert load, and how activations are kept."""

    def __init__(self, block: VisionBlock | DecoderBlock):
        super().__init__()
        self.block = block
        self.load_E: Tensor | None = None  # choices per expert since the last read, on this rank
        self.run: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]] = _call  # set for recomputation

    def step(self, losses_2: Tensor, *inputs: object) -> tuple[Tensor, Tensor]:
        """Run the block; returns its output and the auxiliary losses with its own added."""
        hidden, own_2, counts_E = self.run(self.block, *inputs)
        if own_2 is not None and counts_E is not None:
            losses_2 = losses_2 + own_2
            if self.training:
                counts_E = counts_E.detach()
                self.load_E = counts_E if self.load_E is None else self.load_E + counts_E
        return hidden, losses_2


def _call(block: nn.Module, *inputs: object) -> tuple[Tensor, Tensor | None, Tensor | None]:
    result: tuple[Tensor, Tensor | None, Tensor | None] = block(*inputs)
    return result


class PictureLayer(nn.Module):
    """Pixels of all picture slots -> patch tokens."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.embed = PatchEmbedding(model.vision, model.init_std)

    def forward(self, batch: tuple[Tensor, Tensor]) -> State:
        """uint8 (B, I, height, width, 3), int64 (B, 3, L) -> state."""
        pixels, text_B3L = batch
        B, slots = pixels.shape[:2]
        patches = self.embed(pixels.flatten(0, 1))
        # A leaf with a gradient: a first stage without a sparse block still gets one back from the next stage.
        losses_2 = torch.zeros(2, dtype=torch.float32, device=patches.device, requires_grad=torch.is_grad_enabled())
        return patches.reshape(B, slots * patches.shape[1], -1), losses_2, text_B3L


class VisionLayer(SparseLayer):
    """A vision block on the patch tokens."""

    def __init__(self, block: VisionBlock, model: ModelConfig, image_token: int):
        super().__init__(block)
        self.image_token = image_token

    def forward(self, state: State) -> State:
        """state -> state, S = I*P."""
        hidden_BSD, losses_2, text_B3L = state
        valid_BS = patches_in_use(text_B3L, self.image_token, hidden_BSD.shape[1])
        hidden_BSD, losses_2 = self.step(losses_2, hidden_BSD, valid_BS)
        return hidden_BSD, losses_2, text_B3L


class MergeLayer(nn.Module):
    """LLaVA's two-layer projector (arXiv:2310.03744); its outputs take the places of the picture tokens."""

    def __init__(self, model: ModelConfig, image_token: int):
        super().__init__()
        vision, decoder, std = model.vision, model.decoder, model.init_std
        self.image_token = image_token
        self.norm = LayerNorm(vision.width, vision.norm_eps)
        self.fc1 = Linear(vision.width, decoder.width, std)
        self.fc2 = Linear(decoder.width, decoder.width, std)
        self.tokens = matrix(decoder.vocab_size, decoder.width, std=std)

    def project(self, patches_BSD: Tensor) -> Tensor:
        """Patch tokens (..., vision width) -> (..., decoder width)."""
        return self.fc2(F.gelu(self.fc1(self.norm(patches_BSD))))

    def embed(self, ids_BL: Tensor, features_BSD: Tensor) -> Tensor:
        """Token embeddings (B, L, D), with the k-th picture token of a sequence replaced by its k-th feature."""
        is_picture_BL = ids_BL == self.image_token
        order_BL = (is_picture_BL.cumsum(1) - 1).clamp_min(0)
        index_BLD = order_BL.unsqueeze(-1).expand(-1, -1, features_BSD.shape[-1])
        words_BLD = F.embedding(ids_BL, self.tokens)
        return torch.where(is_picture_BL.unsqueeze(-1), features_BSD.gather(1, index_BLD), words_BLD)

    def forward(self, state: State) -> State:
        """state with S = I*P -> state with S = L."""
        hidden_BSD, losses_2, text_B3L = state
        return self.embed(text_B3L[:, 0], self.project(hidden_BSD)), losses_2, text_B3L


class DecoderLayer(SparseLayer):
    """A decoder block on the packed sequence."""

    def __init__(self, block: DecoderBlock, model: ModelConfig):
        super().__init__(block)
        self.kernel, self.decoder = model.attention, model.decoder

    def forward(self, state: State) -> State:
        """state -> state, S = L."""
        hidden_BLD, losses_2, text_B3L = state
        dtype = hidden_BLD.dtype
        angles = once_per_batch(text_B3L, dtype, lambda: rotary(segment_positions(text_B3L[:, 1]), self.decoder, dtype))
        valid_BL = once_per_batch(text_B3L, "valid tokens", lambda: text_B3L[:, 1] > 0)
        mask = packed_causal_mask(text_B3L, self.kernel)
        hidden_BLD, losses_2 = self.step(losses_2, hidden_BLD, angles, valid_BL, mask)
        return hidden_BLD, losses_2, text_B3L


class HeadLayer(nn.Module):
    """Final norm, vocabulary scores, and the summed cross-entropy of the labelled positions."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(model.decoder.width, model.decoder.norm_eps)
        self.out = Projection(model.decoder.width, model.decoder.vocab_size, model.init_std)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        return self.out(self.norm(hidden))

    def forward(self, state: State) -> tuple[Tensor, Tensor]:
        """state -> summed loss () in fp32, auxiliary losses (2,). Only labelled positions are scored, to save memory."""
        hidden_BLD, losses_2, text_B3L = state
        positions_N = labelled_positions(text_B3L)
        labels_N = text_B3L[:, 2].flatten().index_select(0, positions_N)
        scores_NV = self.logits(hidden_BLD.flatten(0, 1).index_select(0, positions_N)).float()
        return F.cross_entropy(scores_NV, labels_N, reduction="sum"), losses_2


class CaptionLoss:
    """The loss of a micro-batch, scaled so that the mean over all micro-batches of the step is the loss of the step.

    lm_loss is the mean over all caption tokens of the global batch; aux_loss and z_loss are means over sequences and
    sparse blocks. ``targets_per_micro_batch`` is set before each step: caption tokens of the global batch / its number
    of micro-batches.
    """

    parts = ("loss", "lm_loss", "aux_loss", "z_loss")

    def __init__(self, moe: MoEConfig, sparse_blocks: int):
        self.weights = (moe.aux_loss, moe.z_loss)
        self.sparse_blocks = max(1, sparse_blocks)
        self.targets_per_micro_batch = 1.0
        self.sums_4: Tensor | None = None  # of ``parts``, over the micro-batches since the last ``take``

    def __call__(self, outputs: tuple[Tensor, Tensor], _labels: object = None) -> Tensor:
        """Outputs of :class:`HeadLayer` -> scalar loss of the micro-batch."""
        total, losses_2 = outputs
        lm_loss = total / self.targets_per_micro_batch
        aux_loss, z_loss = losses_2 / self.sparse_blocks
        loss = lm_loss + self.weights[0] * aux_loss + self.weights[1] * z_loss
        parts_4 = torch.stack((loss, lm_loss, aux_loss, z_loss)).detach()
        self.sums_4 = parts_4 if self.sums_4 is None else self.sums_4 + parts_4
        return loss

    def take(self) -> Tensor | None:
        """Sums (4,) of ``parts`` since the last call, and start again."""
        sums, self.sums_4 = self.sums_4, None
        return sums


def build_stack(config: Config, image_token: int) -> Stack:
    """The whole model in one process, with the initial weights of the run's seed."""
    return Stack(layer_specs(config.model, image_token), ExpertShard(), config.run.seed)
