"""Language-model head: final norm, vocabulary scores, and their cross-entropy."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megamoe.config import ModelConfig
from megamoe.core.packed_batch import PackedBatch
from megamoe.model.batch import labelled_positions
from megamoe.model.layers import Linear, RMSNorm
from megamoe.model.pipeline_layer import PipelineLayer, SequenceShape, State


class LanguageModelHead(PipelineLayer):
    """The last layer: activations -> summed cross-entropy of the labelled positions."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        decoder = model.decoder
        self.norm = RMSNorm(decoder.width, decoder.norm_eps)
        self.out = Linear(decoder.width, decoder.vocab_size, model.init_std, bias=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the vocabulary, (..., D) -> (..., V)."""
        return self.out(self.norm(hidden))

    def forward(self, state: State) -> tuple[Tensor, Tensor]:
        """state -> summed loss () in fp32, auxiliary losses (2,). To save memory, only labelled positions are scored."""
        hidden_BLD, losses_2, text_B3L = state
        positions_N = labelled_positions(text_B3L)
        labels_N = PackedBatch.of(text_B3L).labels.flatten().index_select(0, positions_N)
        scores_NV = self.logits(hidden_BLD.flatten(0, 1).index_select(0, positions_N)).float()
        return F.cross_entropy(scores_NV, labels_N, reduction="sum"), losses_2

    def flops(self, shape: SequenceShape) -> int:
        """Forward FLOPs for one packed sequence."""
        return self.out.flops(shape.text_tokens)
