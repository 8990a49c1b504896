"""Samples laid one after the other into a sequence of constant length.

A sample is ``[image_id] * P + caption + [eos]``. Segment ids tell attention which tokens belong together, and labels
are already shifted, so that the model needs to know nothing of packing beyond comparing segment ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megamoe.data.sample.tokenizer import Tokenizer

IGNORED = -100  # label of a position that has nothing to predict; what torch's cross entropy ignores


@dataclass(frozen=True)
class PackShape:
    """Sizes of a packed sequence: tokens (L), picture slots (I), a picture's side in pixels and its tokens (P)."""

    length: int
    images: int
    image_size: int
    image_tokens: int


class SequenceBuilder:
    """Fills one sequence.

    ``text`` is int64 (3, L): token ids (padded with ``pad_id``), segment ids (1, 2, ... per sample; 0 for padding) and
    labels (the next token where that is a caption token or the end of the same sample, else ``IGNORED``).
    ``pixels`` is uint8 (I, H, W, 3), slot i belonging to segment i + 1; unused slots are zero. Both may be given, to be
    filled where they lie; default new ones.
    """

    def __init__(
        self,
        shape: PackShape,
        tokenizer: Tokenizer,
        pixels: npt.NDArray[np.uint8] | None = None,
        text: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._shape = shape
        self._image_id, self._eos_id = tokenizer.image_id, tokenizer.eos_id
        side = shape.image_size
        self.pixels = np.empty((shape.images, side, side, 3), dtype=np.uint8) if pixels is None else pixels
        self.text = np.empty((3, shape.length), dtype=np.int64) if text is None else text
        self.text[0], self.text[1], self.text[2] = tokenizer.pad_id, 0, IGNORED
        self.samples = 0
        self.truncated = 0
        self.targets = 0
        self._used = 0

    @property
    def next_picture(self) -> npt.NDArray[np.uint8]:
        """Where the next sample's picture belongs: uint8 (H, W, 3). To be written before :meth:`add`."""
        return self.pixels[self.samples]

    @property
    def full(self) -> bool:
        """Whether no sample can fit, whatever its caption."""
        return self.samples == self._shape.images or self._room <= self._shape.image_tokens + 1

    def fits(self, caption: list[int]) -> bool:
        """Whether a sample with these caption ids has room. In an empty sequence each has, for it is cut to length."""
        return not self.full and (self.samples == 0 or self._shape.image_tokens + len(caption) + 1 <= self._room)

    def add(self, caption: list[int]) -> None:
        """Append a sample that fits, its picture already in place.

        A caption longer than ``L - P - 1`` is cut and counted; its end token stays.
        """
        assert self.fits(caption)
        most = self._shape.length - self._shape.image_tokens - 1
        if len(caption) > most:
            caption = caption[:most]
            self.truncated += 1
        start, text = self._used, self._used + self._shape.image_tokens
        end = text + len(caption) + 1
        self.text[0, start:text] = self._image_id
        self.text[0, text:end] = [*caption, self._eos_id]
        self.text[1, start:end] = self.samples + 1
        self.text[2, text - 1 : end - 1] = self.text[0, text:end]  # the last picture token predicts the first word
        self.samples += 1
        self.targets += end - text
        self._used = end

    def finish(self) -> None:
        """Clear the picture slots that no sample took."""
        self.pixels[self.samples :] = 0

    @property
    def _room(self) -> int:
        return self._shape.length - self._used
