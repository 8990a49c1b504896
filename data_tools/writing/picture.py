"""Prepare a picture for a shard: check it as training will decode it, and resize it if requested."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from megamoe.data.sample.decode import MAX_PIXELS, CorruptSample, decode_image, to_rgb

_CHECKED_AT = 32  # pixels; every byte is decoded, but the result is small
_FILTER = Image.Resampling.BICUBIC
_LONGEST = 65_500  # pixels; the longest side that libjpeg writes
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class Picture(NamedTuple):
    """The bytes for a shard and their extension; sides in pixels, the original ones from the header of the file."""

    data: bytes
    ext: str
    width: int
    height: int
    original_width: int
    original_height: int


def make_picture(data: bytes, resize_mode: str, image_size: int, quality: int) -> Picture:
    """Check ``data``, and resize it as the img2dataset mode of the same name does.

    ``no`` keeps the bytes unchanged. The other modes make an RGB JPEG, with the Exif orientation applied and transparency
    composited on white: ``keep_ratio`` with ``image_size`` as the shorter side, ``center_crop`` the middle square of that,
    ``border`` with ``image_size`` as the longer side, padded with white to a square.

    Raises:
        CorruptSample: it is not a JPEG, PNG or WebP, is damaged, or has too many pixels.
    """
    decode_image(data, _CHECKED_AT)
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
            original = image.size
            if resize_mode == "no":
                return Picture(data, _EXTENSIONS[str(image.format)], *original, *original)
            image.load()
            resized = _resize(to_rgb(ImageOps.exif_transpose(image)), resize_mode, image_size)
    except (OSError, ValueError, SyntaxError) as error:  # faults that only Pillow finds
        raise CorruptSample(f"image: {' '.join(str(error).split())}") from error
    return Picture(_encode(resized, quality), "jpg", *resized.size, *original)


def _resize(image: Image.Image, mode: str, size: int) -> Image.Image:
    width, height = image.size
    if mode == "center_crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize((size, size), _FILTER, box=(left, top, left + side, top + side))
    scale = size / (min(width, height) if mode == "keep_ratio" else max(width, height))
    sides = (max(1, round(width * scale)), max(1, round(height * scale)))
    if sides[0] * sides[1] > MAX_PIXELS or max(sides) > _LONGEST:  # for example, one pixel by millions
        raise CorruptSample(f"image: {width} x {height} pixels, too long to be resized to a shorter side of {size}")
    image = image.resize(sides, _FILTER)
    if mode == "keep_ratio":
        return image
    square = Image.new("RGB", (size, size), (255, 255, 255))
    square.paste(image, ((size - sides[0]) // 2, (size - sides[1]) // 2))
    return square


def _encode(image: Image.Image, quality: int) -> bytes:
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality, colorsubsampling="420")
    return data
