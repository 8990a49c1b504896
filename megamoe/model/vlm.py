"""The model as a list of layers, each a function from a tuple of tensors to a tuple of tensors.

Between layers travel ``(hidden_BSD, losses_2, text_B3L)``: activations of the current tower, the auxiliary losses summed
over the sparse blocks so far (fp32), and the packed text (ids, segment ids, labels; integers, no gradient). A pipeline can
cut the list anywhere. Nothing else crosses a cut, so only the first stage reads data. Tensors with a gradient come first:
DeepSpeed 0.19.8 reuses its receive buffers by position for activations and gradients, and ignores the type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from megamoe.config import Config, ModelConfig
from megamoe.core.packed_batch import PackedBatch
from megamoe.model.attention import segment_positions
from megamoe.model.decoder import DecoderLayer, KVCache, rotary
from megamoe.model.head import LanguageModelHead
from megamoe.model.layer_names import layer_names
from megamoe.model.parameter import ExpertShard, initialize
from megamoe.model.pipeline_layer import PipelineLayer, State
from megamoe.model.projector import ProjectorLayer
from megamoe.model.vision import PatchEmbeddingLayer, VisionLayer

_Layer = TypeVar("_Layer", bound=PipelineLayer)


@dataclass(frozen=True)
class LayerSpec:
    """A layer that is not built yet: its global name, whether it has experts, and how to build this rank's part."""

    name: str
    sparse: bool
    build: Callable[[ExpertShard], PipelineLayer]


def layer_specs(model: ModelConfig, image_token: int) -> list[LayerSpec]:
    """List all layers in order. ``image_token`` is the id that stands in the text where a picture's patches go."""
    builders: list[Callable[[ExpertShard], PipelineLayer]] = [
        lambda _: PatchEmbeddingLayer(model),
        *(partial(VisionLayer, model, i, image_token=image_token) for i in range(model.vision.depth)),
        lambda _: ProjectorLayer(model, image_token),
        *(partial(DecoderLayer, model, i) for i in range(model.decoder.depth)),
        lambda _: LanguageModelHead(model),
    ]
    return [
        LayerSpec(name, sparse, build) for (name, sparse), build in zip(layer_names(model).items(), builders, strict=True)
    ]


def named_parameters(layer_name: str, layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a layer under the names that checkpoints use on every layout."""
    for local_name, parameter in layer.named_parameters():
        yield f"{layer_name}.{local_name.removeprefix('block.')}", parameter


def build_layer(spec: LayerSpec, shard: ExpertShard, seed: int | None) -> PipelineLayer:
    """Build this rank's part of a layer with its initial weights. Without a seed they stay unset, ready for a load."""
    layer = spec.build(shard)
    if seed is not None:
        for name, parameter in named_parameters(spec.name, layer):
            initialize(name, parameter, seed)
    return layer


@dataclass
class DecodingState:
    """What generation keeps between :meth:`VisionLanguageModel.prefill` and each ``decode_step``.

    Attributes:
        caches: Keys and values of each decoder block.
        visible_BL: Which positions later tokens may see: all but the padding of a row. True for tokens to come.
        position_B: Position of each row's last token within its sample.
        length: Positions in use.
    """

    caches: list[KVCache]
    visible_BL: Tensor
    position_B: Tensor
    length: int


class VisionLanguageModel(nn.Module):
    """All layers in one process: the whole model, or a rank's part of it where there is no pipeline."""

    def __init__(self, specs: list[LayerSpec], shard: ExpertShard, seed: int | None):
        super().__init__()
        self.specs = specs
        self.layers = nn.ModuleList(build_layer(spec, shard, seed) for spec in specs)

    def forward(self, pixels: Tensor, text_B3L: Tensor, kernel: str | None = None) -> tuple[Tensor, Tensor]:
        """Compute the losses of a packed batch.

        Args:
            pixels: uint8 (B, I, height, width, 3).
            text_B3L: Packed text, see :class:`megamoe.core.packed_batch.PackedBatch`.
            kernel: Attention kernel of the decoder; default the one of the config.

        Returns:
            Summed caption loss () and auxiliary losses (2,), both fp32.
        """
        losses: tuple[Tensor, Tensor] = self.head(self._encode(pixels, text_B3L, kernel))
        return losses

    def prefill(self, pixels_BHWC: Tensor, text_B3L: Tensor, new_tokens: int) -> tuple[Tensor, DecodingState]:
        """Read one picture and prompt per row, and get ready to generate.

        Attention takes a dense mask on any device: rows are short, and a compiled kernel would be built anew for each
        length.

        Args:
            pixels_BHWC: uint8, one picture per row.
            text_B3L: One sample per row, padded on the left so that all rows end together.
            new_tokens: Most tokens that will be generated.

        Returns:
            Scores of the next token (B, V) in fp32, and the state for :meth:`decode_step`.
        """
        rows, _, length = text_B3L.shape
        caches = [layer.block.attention.new_cache(rows, length + new_tokens) for layer in self.decoder_layers]
        hidden_BLD = self._encode(pixels_BHWC.unsqueeze(1), text_B3L, "sdpa", caches)[0]
        segments_BL = PackedBatch.of(text_B3L).segments
        visible_BL = F.pad(segments_BL > 0, (0, new_tokens), value=True)
        state = DecodingState(caches, visible_BL, segment_positions(segments_BL)[:, -1], length)
        return self.head.logits(hidden_BLD[:, -1]).float(), state

    def decode_step(self, ids_B: Tensor, alive_B: Tensor, state: DecodingState) -> Tensor:
        """Append one token to each row, and update ``state``.

        Args:
            ids_B: The tokens.
            alive_B: Rows that are still generating. The others visit no expert.
            state: From :meth:`prefill`.

        Returns:
            Scores of the next token (B, V) in fp32.
        """
        state.length += 1
        state.position_B = state.position_B + 1
        hidden_B1D = self.projector.embed_tokens(ids_B).unsqueeze(1)
        alive_B1, visible_B11L = alive_B.unsqueeze(1), state.visible_BL[:, None, None, : state.length]
        layers = self.decoder_layers
        angles = rotary(state.position_B.unsqueeze(1), layers[0].decoder, hidden_B1D.dtype)
        for layer, cache in zip(layers, state.caches, strict=True):
            hidden_B1D = layer.decode(hidden_B1D, angles, alive_B1, visible_B11L, cache)
        return self.head.logits(hidden_B1D[:, -1]).float()

    @property
    def patch_embedding(self) -> PatchEmbeddingLayer:
        """The first layer."""
        return self._only(PatchEmbeddingLayer)

    @property
    def projector(self) -> ProjectorLayer:
        """The layer between the towers."""
        return self._only(ProjectorLayer)

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers of the decoder's blocks, in order."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @property
    def head(self) -> LanguageModelHead:
        """The last layer."""
        return self._only(LanguageModelHead)

    def _encode(self, pixels: Tensor, text_B3L: Tensor, kernel: str | None = None, caches: Sequence[KVCache] = ()) -> State:
        """Run all layers but the head. Keys and values of the decoder's blocks go to ``caches`` if given."""
        state: tuple[Tensor, ...] = (pixels, text_B3L)
        waiting = iter(caches)
        for layer in self.layers:
            if isinstance(layer, DecoderLayer):
                state = layer(state, kernel, next(waiting, None))
            elif not isinstance(layer, LanguageModelHead):
                state = layer(state)
        hidden_BLD, losses_2, text_B3L = state
        return hidden_BLD, losses_2, text_B3L

    def _only(self, kind: type[_Layer]) -> _Layer:
        (layer,) = (layer for layer in self.layers if isinstance(layer, kind))
        return layer


def build_model(config: Config, image_token: int) -> VisionLanguageModel:
    """Build the whole model in one process, with the initial weights of the run's seed."""
    return VisionLanguageModel(layer_specs(config.model, image_token), ExpertShard(), config.run.seed)
