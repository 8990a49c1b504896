"""The training loss of a micro-batch, and its parts summed over a step."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.config import MoEConfig


class CaptionLoss:
    """The loss of a micro-batch, scaled so that the mean over all micro-batches of a step is the loss of the step.

    lm_loss is the mean over all caption tokens of the global batch. aux_loss and z_loss are means over sequences and
    sparse blocks.

    Attributes:
        targets_per_micro_batch: Caption tokens of the global batch / number of its micro-batches. Set it before each
            step.
        sums_4: Sums of ``parts`` over the micro-batches since the last :meth:`take`.
    """

    parts = ("loss", "lm_loss", "aux_loss", "z_loss")

    def __init__(self, moe: MoEConfig, sparse_blocks: int):
        self.weights = (moe.aux_loss, moe.z_loss)
        self.sparse_blocks = max(1, sparse_blocks)
        self.targets_per_micro_batch = 1.0
        self.sums_4: Tensor | None = None

    def __call__(self, outputs: tuple[Tensor, Tensor], _labels: object = None) -> Tensor:
        """Turn outputs of :class:`megamoe.model.head.LanguageModelHead` into the scalar loss of the micro-batch."""
        total, losses_2 = outputs
        lm_loss = total / self.targets_per_micro_batch
        aux_loss, z_loss = losses_2 / self.sparse_blocks
        loss = lm_loss + self.weights[0] * aux_loss + self.weights[1] * z_loss
        parts_4 = torch.stack((loss, lm_loss, aux_loss, z_loss)).detach()
        self.sums_4 = parts_4 if self.sums_4 is None else self.sums_4 + parts_4
        return loss

    def take(self) -> Tensor | None:
        """Return the sums (4,) of ``parts`` since the last call, and start again."""
        sums, self.sums_4 = self.sums_4, None
        return sums
