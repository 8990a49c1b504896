"""A picture on its way into a shard: checked as the trainer will decode it, and made smaller if that is asked for."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from megamoe.data.sample.decode import MAX_PIXELS, CorruptSample, decode_image, to_rgb

_CHECKED_AT = 32  # pixels; every byte is decoded all the same, only the result is small
_FILTER = Image.Resampling.BICUBIC
_LONGEST = 65_500  # what libjpeg writes
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class Picture(NamedTuple):
    """Bytes for a shard and their kind; sides in pixels, the original ones as the file's header gives them."""

    data: bytes
    ext: str
    width: int
    height: int
    original_width: int
    original_height: int


def make_picture(data: bytes, resize_mode: str, image_size: int, quality: int) -> Picture:
    """Check ``data``, and resize it as img2dataset does under these names.

    ``no`` keeps the bytes as they are. The others make an RGB JPEG, with the Exif orientation applied and transparency
    laid on white: ``keep_ratio`` with ``image_size`` as the shorter side, ``center_crop`` the middle square of that,
    ``border`` with ``image_size`` as the longer side and white around it to a square.

    Raises:
        CorruptSample: no JPEG, PNG or WebP, damaged, or of too many pixels.
    """
    decode_image(data, _CHECKED_AT)
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
            original = image.size
            if resize_mode == "no":
                return Picture(data, _EXTENSIONS[str(image.format)], *original, *original)
            image.load()
            resized = _resize(to_rgb(ImageOps.exif_transpose(image)), resize_mode, image_size)
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow alone finds wrong
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
    if sides[0] * sides[1] > MAX_PIXELS or max(sides) > _LONGEST:  # a strip of one pixel by millions
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
