"""What every layer of the model's list offers: a function from state to state, and its FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

State = tuple[Tensor, Tensor, Tensor]
"""Activations (B, S, D), auxiliary losses (2,), packed text (B, 3, L); :mod:`megamoe.model.vlm` says why these."""

BlockOutput = tuple[Tensor, Tensor | None, Tensor | None]
"""Activations (B, S, D), and of a sparse block its losses (2,) and choices per expert (E,), else None twice."""


@dataclass(frozen=True)
class SequenceShape:
    """A packed sequence with all picture slots used.

    Attributes:
        length: Tokens (L).
        images: Picture slots (I).
        patches: Patches of a picture (P).
    """

    length: int
    images: int
    patches: int

    @property
    def patch_tokens(self) -> int:
        """Tokens of the vision encoder."""
        return self.images * self.patches

    @property
    def text_tokens(self) -> int:
        """Tokens that are no picture tokens. Only these are scored."""
        return max(0, self.length - self.patch_tokens)

    @property
    def segment(self) -> float:
        """Mean tokens of a segment: on average a sequence has as many segments as picture slots."""
        return self.length / self.images


class PipelineLayer(nn.Module):
    """One entry of the model's list of layers. A pipeline can cut before each of them."""

    def flops(self, shape: SequenceShape) -> float:
        """Forward FLOPs for one packed sequence, counted on a layer that holds all experts."""
        raise NotImplementedError


class BlockLayer(PipelineLayer):
    """The layer around a block of either tower: auxiliary losses, expert load, and recomputation.

    Attributes:
        block: The transformer block, dense or sparse.
        load_E: Choices per expert on this rank since the last read; None if there were none.
        run: Calls the block; replaced to recompute activations in the backward pass.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.load_E: Tensor | None = None
        self.run: Callable[..., BlockOutput] = call_block

    def step(self, losses_2: Tensor, *inputs: object) -> tuple[Tensor, Tensor]:
        """Run the block. Return its output, and the auxiliary losses with the block's own added."""
        hidden, own_2, counts_E = self.run(self.block, *inputs)
        if own_2 is not None and counts_E is not None:
            losses_2 = losses_2 + own_2
            if self.training:
                counts_E = counts_E.detach()
                self.load_E = counts_E if self.load_E is None else self.load_E + counts_E
        return hidden, losses_2


def call_block(block: nn.Module, *inputs: object) -> BlockOutput:
    """Call the block and keep its activations for the backward pass."""
    result: BlockOutput = block(*inputs)
    return result
