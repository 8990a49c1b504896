"""Sizes that follow from the settings alone: parameters, active parameters, FLOPs per token, memory.

Matrix products count 2 FLOPs per multiply-add; backward counts twice forward. Embedding look-ups, norms and activations
are left out, as in the usual model-FLOPs convention (arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.config.model import DecoderConfig, MoEConfig, VisionConfig
from megamoe.config.schema import Config


@dataclass(frozen=True)
class LayerSize:
    """One layer: parameters by kind, and forward FLOPs for one packed sequence."""

    name: str
    dense: int
    expert: int
    active: int
    flops: float
    sparse: bool

    @property
    def parameters(self) -> int:
        """All parameters of the layer."""
        return self.dense + self.expert


@dataclass(frozen=True)
class ModelSize:
    """The whole model."""

    layers: tuple[LayerSize, ...]
    sequence_length: int

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses (its own tower's, with top_k of the experts), both towers added."""
        return sum(layer.active for layer in self.layers)

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts."""
        return sum(layer.expert for layer in self.layers)

    @property
    def sparse_blocks(self) -> int:
        """Blocks with experts, in both towers."""
        return sum(layer.sparse for layer in self.layers)

    @property
    def flops_per_sequence(self) -> float:
        """Forward and backward of one packed sequence with all picture slots used."""
        return 3 * sum(layer.flops for layer in self.layers)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, per token of the packed sequence."""
        return self.flops_per_sequence / self.sequence_length

    def tower(self, prefix: str) -> int:
        """Parameters of the layers whose name starts with ``prefix``."""
        return sum(layer.parameters for layer in self.layers if layer.name.startswith(prefix))


def model_size(config: Config) -> ModelSize:
    """Count without building anything."""
    model, data = config.model, config.data
    vision, decoder, moe = model.vision, model.decoder, model.moe
    patch_tokens = vision.patches * data.images_per_sequence
    # Attention stays within a sample: on average a sequence is cut into as many segments as it has picture slots.
    segment = data.sequence_length / data.images_per_sequence
    embed = (3 * vision.patch_size**2 + 1) * vision.width
    layers = [_dense("vision.embed", embed + vision.patches * vision.width, 2 * embed * patch_tokens)]
    layers += [_vision_block(vision, moe, i, patch_tokens) for i in range(vision.depth)]
    projector = vision.width * decoder.width + decoder.width**2
    merge = projector + 2 * vision.width + 2 * decoder.width + decoder.vocab_size * decoder.width
    layers.append(_dense("merge", merge, 2 * projector * patch_tokens))
    layers += [_decoder_block(decoder, moe, i, data.sequence_length, segment) for i in range(decoder.depth)]
    head = decoder.vocab_size * decoder.width
    # Only text positions are scored; picture tokens are not.
    text_tokens = max(0, data.sequence_length - patch_tokens)
    layers.append(_dense("head", head + decoder.width, 2 * head * text_tokens))
    return ModelSize(tuple(layers), data.sequence_length)


def _dense(name: str, parameters: int, flops: float) -> LayerSize:
    return LayerSize(name, parameters, 0, parameters, flops, False)


def _vision_block(vision: VisionConfig, moe: MoEConfig, i: int, tokens: int) -> LayerSize:
    width = vision.width
    attention, norms = 4 * (width * width + width), 4 * width
    scores = 4 * vision.patches * width * tokens
    mlp = 2 * width * vision.mlp_width + vision.mlp_width + width
    return _block(
        f"vision.blocks.{i}",
        vision.is_sparse(i),
        attention,
        norms,
        mlp,
        width,
        vision.expert_width,
        moe,
        tokens,
        scores,
    )


def _decoder_block(decoder: DecoderConfig, moe: MoEConfig, i: int, tokens: int, segment: float) -> LayerSize:
    width, queries = decoder.width, decoder.heads * decoder.head_dim
    attention = 2 * width * queries + 2 * width * decoder.kv_heads * decoder.head_dim
    norms = 2 * width + 2 * decoder.head_dim
    scores = 4 * (segment / 2) * queries * tokens  # causal: half of the segment on average
    mlp = 3 * width * decoder.mlp_width
    return _block(
        f"decoder.blocks.{i}",
        decoder.is_sparse(i),
        attention,
        norms,
        mlp,
        width,
        decoder.expert_width,
        moe,
        tokens,
        scores,
    )


def _block(
    name: str,
    sparse: bool,
    attention: int,
    norms: int,
    mlp: int,
    width: int,
    expert_width: int,
    moe: MoEConfig,
    tokens: int,
    scores: float,
) -> LayerSize:
    if not sparse:
        return _dense(name, attention + norms + mlp, 2 * (attention + mlp) * tokens + scores)
    router, expert = moe.experts * width, 3 * width * expert_width
    active = attention + router + moe.top_k * expert
    flops = 2 * active * tokens + scores
    return LayerSize(name, attention + norms + router, moe.experts * expert, active + norms, flops, True)
