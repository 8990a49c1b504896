"""Compute a 64-bit perceptual hash: pictures that look alike differ in few bits.

It is the pHash of Zauner (2010). The picture becomes 32 x 32 grey values; of its two-dimensional DCT-II the 8 x 8 lowest
frequencies are kept, and each gives one bit: whether it is above their median. The DCT is two products with an 8 x 32
matrix, so NumPy is enough.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megamoe.data.sample.decode import decode_image

_SIDE, _LOW = 32, 8
_FINER = 2  # decoded at twice the side and averaged: scaling of large JPEGs changes at most 2 bits so, 8 at side 32
_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow and OpenCV weigh colours
_FLAT = 1.0  # grey levels: a picture with a smaller range of values has no features
_BASIS: npt.NDArray[np.float64] = np.cos(
    np.pi / _SIDE * np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5)
)  # rows: frequencies; the scale does not matter to a median


def perceptual_hash(data: bytes) -> int | None:
    """Return the hash of the picture ``data`` (a JPEG, PNG or WebP), 0 to 2^64 - 1; None for a single colour.

    The hash of a picture of a single colour would depend on rounding only.

    Raises:
        CorruptSample: as for :func:`megamoe.data.sample.decode.decode_image`.
    """
    fine = decode_image(data, _SIDE * _FINER) @ _GREY
    grey = fine.reshape(_SIDE, _FINER, _SIDE, _FINER).mean(axis=(1, 3))
    if float(np.ptp(grey)) <= _FLAT:
        return None
    low = _BASIS @ grey @ _BASIS.T
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")
