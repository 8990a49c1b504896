"""Pack samples one after the other into a sequence of constant length.

A sample is ``[image_id] * P + caption + [eos]``. Segment ids tell attention which tokens belong together, and labels
are already shifted, so the model only has to compare segment ids. :mod:`megamoe.core.packed_batch` has the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megamoe.core.packed_batch import clear_text, write_sample


class SpecialIds(Protocol):
    """The ids that packing needs; a :class:`megamoe.data.sample.tokenizer.Tokenizer` has them."""

    @property
    def image_id(self) -> int:
        """Id of a picture token."""

    @property
    def pad_id(self) -> int:
        """Id of padding."""

    @property
    def eos_id(self) -> int:
        """Id of the end of sequence."""


@dataclass(frozen=True)
class PackShape:
    """Sizes of a packed sequence: tokens (L), picture slots (I), a picture's side in pixels and its tokens (P)."""

    length: int
    images: int
    image_size: int
    image_tokens: int


class SequenceBuilder:
    """Fill one sequence, sample by sample.

    Args:
        shape: Sizes of the sequence.
        vocabulary: The special ids.
        pixels: uint8 (I, H, W, 3) to fill in place; default a new array. Slot i belongs to segment i + 1, and unused
            slots are zero.
        text: int64 (3, L) to fill in place; default a new array. Captions and ends of sequence have labels.
    """

    def __init__(
        self,
        shape: PackShape,
        vocabulary: SpecialIds,
        pixels: npt.NDArray[np.uint8] | None = None,
        text: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._shape = shape
        self._image_id, self._eos_id = vocabulary.image_id, vocabulary.eos_id
        side = shape.image_size
        self.pixels = np.empty((shape.images, side, side, 3), dtype=np.uint8) if pixels is None else pixels
        self.text = np.empty((3, shape.length), dtype=np.int64) if text is None else text
        clear_text(self.text, vocabulary.pad_id)
        self.samples = 0
        self.truncated = 0
        self.targets = 0
        self._used = 0

    @property
    def next_picture(self) -> npt.NDArray[np.uint8]:
        """Slot of the next sample's picture, uint8 (H, W, 3). Write the picture into it before calling :meth:`add`."""
        return self.pixels[self.samples]

    @property
    def full(self) -> bool:
        """Whether no sample fits, however short its caption."""
        return self.samples == self._shape.images or self._room <= self._shape.image_tokens + 1

    def fits(self, caption: list[int]) -> bool:
        """Whether a sample with these caption ids fits. Any caption fits an empty sequence, because it is cut to length."""
        return not self.full and (self.samples == 0 or self._shape.image_tokens + len(caption) + 1 <= self._room)

    def add(self, caption: list[int]) -> None:
        """Append a sample that fits and whose picture is in place.

        A caption longer than ``L - P - 1`` is cut and counted as truncated; it keeps its end token.
        """
        assert self.fits(caption)
        most = self._shape.length - self._shape.image_tokens - 1
        if len(caption) > most:
            caption = caption[:most]
            self.truncated += 1
        self.samples += 1
        self.targets += len(caption) + 1
        self._used = write_sample(
            self.text, self._used, self.samples, self._image_id, self._shape.image_tokens, [*caption, self._eos_id]
        )

    def finish(self) -> None:
        """Set the unused picture slots to zero."""
        self.pixels[self.samples :] = 0

    @property
    def _room(self) -> int:
        return self._shape.length - self._used
