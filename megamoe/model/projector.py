"""From patch tokens to the decoder's input: the projector, and the token embedding that its outputs are set into."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megamoe.config import ModelConfig
from megamoe.core.packed_batch import PackedBatch
from megamoe.model.layers import LayerNorm, Linear
from megamoe.model.parameter import matrix
from megamoe.model.pipeline_layer import PipelineLayer, SequenceShape, State


class ProjectorLayer(PipelineLayer):
    """LLaVA's two-layer projector (arXiv:2310.03744) and the token embedding.

    Checkpoints call this layer ``merge``.
    """

    def __init__(self, model: ModelConfig, image_token: int):
        super().__init__()
        vision, decoder, std = model.vision, model.decoder, model.init_std
        self.image_token = image_token
        self.norm = LayerNorm(vision.width, vision.norm_eps)
        self.fc1 = Linear(vision.width, decoder.width, std, bias=True)
        self.fc2 = Linear(decoder.width, decoder.width, std, bias=True)
        self.tokens = matrix(decoder.vocab_size, decoder.width, std=std)

    def project(self, patches_BSD: Tensor) -> Tensor:
        """Project patch tokens, (..., vision width) -> (..., decoder width)."""
        return self.fc2(F.gelu(self.fc1(self.norm(patches_BSD))))

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Look up token embeddings, (...) -> (..., D)."""
        return F.embedding(ids, self.tokens)

    def embed(self, ids_BL: Tensor, features_BSD: Tensor) -> Tensor:
        """Embed tokens (B, L, D), with the k-th picture token of a sequence replaced by the sequence's k-th feature."""
        is_picture_BL = ids_BL == self.image_token
        order_BL = (is_picture_BL.cumsum(1) - 1).clamp_min(0)
        index_BLD = order_BL.unsqueeze(-1).expand(-1, -1, features_BSD.shape[-1])
        words_BLD = self.embed_tokens(ids_BL)
        return torch.where(is_picture_BL.unsqueeze(-1), features_BSD.gather(1, index_BLD), words_BLD)

    def forward(self, state: State) -> State:
        """Replace the activations of patch tokens, S = I*P, by those of the packed sequence, S = L."""
        hidden_BSD, losses_2, text_B3L = state
        return self.embed(PackedBatch.of(text_B3L).ids, self.project(hidden_BSD)), losses_2, text_B3L

    def flops(self, shape: SequenceShape) -> int:
        """Forward FLOPs for one packed sequence. Unlike those of other layers, the two biases have never counted."""
        return 2 * shape.patch_tokens * (self.fc1.weight.numel() + self.fc2.weight.numel())
