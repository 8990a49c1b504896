"""Parameters and FLOPs of a config's model, counted on layers that are built without memory.

Backward counts twice forward; :mod:`megamoe.model.layers` says what counts in forward. Importing this module is cheap.
The first call of :func:`model_size` imports torch, which takes a second or two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megamoe.config import Config, ModelConfig


@dataclass(frozen=True)
class LayerSize:
    """One layer.

    Attributes:
        name: Global name of the layer.
        dense: Parameters outside the experts.
        expert: Parameters of all experts.
        active: Parameters that one token uses.
        flops: Forward FLOPs for one packed sequence.
        sparse: Whether the layer has experts.
    """

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
        """Parameters that one token uses in its own tower, with top_k of the experts; summed over both towers."""
        return sum(layer.active for layer in self.layers)

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts."""
        return sum(layer.expert for layer in self.layers)

    @property
    def sparse_blocks(self) -> int:
        """Number of blocks with experts, in both towers."""
        return sum(layer.sparse for layer in self.layers)

    @property
    def flops_per_sequence(self) -> float:
        """Forward and backward FLOPs of one packed sequence with all picture slots used."""
        return 3 * sum(layer.flops for layer in self.layers)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward FLOPs per token of the packed sequence."""
        return self.flops_per_sequence / self.sequence_length

    def tower(self, prefix: str) -> int:
        """Parameters of the layers whose name starts with ``prefix``."""
        return sum(layer.parameters for layer in self.layers if layer.name.startswith(prefix))


def model_size(config: Config) -> ModelSize:
    """Count parameters and FLOPs of every layer."""
    data = config.data
    return _count(config.model.model_dump_json(), data.sequence_length, data.images_per_sequence)


@lru_cache(maxsize=64)  # planning asks for the same model again under every layout
def _count(model_json: str, length: int, images: int) -> ModelSize:
    import torch

    from megamoe.model.parameter import ExpertShard, info_of
    from megamoe.model.pipeline_layer import SequenceShape
    from megamoe.model.vlm import build_layer, layer_specs

    model = ModelConfig.model_validate_json(model_json)
    shape = SequenceShape(length, images, model.vision.patches)
    sizes = []
    for spec in layer_specs(model, image_token=0):
        with torch.device("meta"):
            layer = build_layer(spec, ExpertShard(), seed=None)
        dense = sum(parameter.numel() for parameter in layer.parameters() if not info_of(parameter).is_expert)
        expert = sum(parameter.numel() for parameter in layer.parameters() if info_of(parameter).is_expert)
        active = dense + expert * model.moe.top_k // model.moe.experts
        sizes.append(LayerSize(spec.name, dense, expert, active, layer.flops(shape), spec.sparse))
    return ModelSize(tuple(sizes), length)
