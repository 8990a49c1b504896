"""Layout of packed text, int64 (..., 3, L): token ids, segment ids and labels in one array.

One array travels through shared memory and between pipeline stages as one piece. This module alone knows its rows, and
reads NumPy arrays and torch tensors alike. It does not import torch, because data workers must start without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

IGNORE = -100
"""Label of a position that predicts nothing. torch's cross entropy ignores it by default."""


class _Indexable(Protocol):
    def __getitem__(self, index: Any, /) -> Any: ...


Array = TypeVar("Array", bound=_Indexable)


class PackedBatch(NamedTuple, Generic[Array]):
    """Named views of packed text. Writing to them writes to the text.

    Attributes:
        ids: Token ids (..., L).
        segments: 1, 2, ... for the tokens of each sample in the sequence; 0 for padding.
        labels: The token to predict at each position, or ``IGNORE``.
    """

    ids: Array
    segments: Array
    labels: Array

    @classmethod
    def of(cls, text: Array) -> PackedBatch[Array]:
        """Name the rows of packed text (..., 3, L)."""
        return PackedBatch(text[..., 0, :], text[..., 1, :], text[..., 2, :])

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding. Reading it from a GPU waits for the GPU."""
        segments: Any = self.segments
        return int((segments > 0).sum())

    @property
    def targets(self) -> int:
        """Number of positions with a label. Reading it from a GPU waits for the GPU."""
        labels: Any = self.labels
        return int((labels != IGNORE).sum())


def clear_text(text: npt.NDArray[np.int64], pad_id: int) -> None:
    """Fill packed text with padding."""
    ids, segments, labels = PackedBatch.of(text)
    ids[...], segments[...], labels[...] = pad_id, 0, IGNORE


def empty_text(rows: int, length: int, pad_id: int) -> npt.NDArray[np.int64]:
    """Make packed text (B, 3, L) that holds only padding."""
    text = np.empty((rows, 3, length), dtype=np.int64)
    clear_text(text, pad_id)
    return text


def write_sample(
    text_3L: npt.NDArray[np.int64],
    start: int,
    segment: int,
    image_id: int,
    patches: int,
    words: Sequence[int],
    labelled: bool = True,
) -> int:
    """Write one sample into a sequence: its picture tokens, then its words.

    Labels are shifted already: the last picture token predicts the first word, and the last word predicts nothing.

    Args:
        text_3L: Sequence to write into.
        start: Position of the first picture token.
        segment: Segment id of the sample.
        image_id: Id of a picture token.
        patches: Number of picture tokens.
        words: Ids of the caption, and of the end of sequence if it is to be predicted.
        labelled: Whether the words are to be predicted.

    Returns:
        The position after the last word.
    """
    ids, segments, labels = PackedBatch.of(text_3L)
    first_word = start + patches
    end = first_word + len(words)
    ids[start:first_word] = image_id
    ids[first_word:end] = words
    segments[start:end] = segment
    if labelled:
        labels[first_word - 1 : end - 1] = ids[first_word:end]
    return end
