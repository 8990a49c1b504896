"""Decode the bytes of a member to pixels or text, and reject damaged ones.

A picture is resized straight to a square: the aspect ratio is not kept, nothing is cropped. libjpeg-turbo first scales
larger JPEGs down in the DCT to no less than the target; then Pillow resizes (bicubic, antialiased).

``simplejpeg`` in strict mode decodes JPEGs, since it rejects bit damage that other decoders ignore. PNG chunks are
checked against their CRC, which Pillow does not do for pixel data. WebP has no checksums, so only damage that breaks the
stream is detected.
"""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps

MAX_PIXELS = 64 * 1024 * 1024  # a header that claims more is treated as a decompression bomb
_ORIENTATION = 0x0112
_START_OF_SCAN = 0xDA
_EXIF = 0xE1
_PNG = b"\x89PNG\r\n\x1a\n"
_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class CorruptSample(Exception):
    """A sample that cannot be used; the message is the reason. The reader counts it as lost and takes the next."""


def decode_image(data: bytes | memoryview, size: int, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
    """Decode a JPEG, PNG or WebP (detected from its first bytes, not from its name) to RGB.

    Transparency is composited on white, the Exif orientation is applied, and an animation gives its first frame.

    Args:
        data: the file's bytes.
        size: side of the result in pixels.
        out: uint8 (size, size, 3), contiguous; filled and returned. Default: a new array. After an error it may hold part
            of the picture.

    Returns:
        uint8 (size, size, 3).

    Raises:
        CorruptSample: empty, not a picture, truncated, damaged, or larger than ``MAX_PIXELS``.
    """
    if not data:
        raise CorruptSample("image: empty")
    out = np.empty((size, size, 3), dtype=np.uint8) if out is None else out
    try:
        if data[:3] == b"\xff\xd8\xff":
            image = _jpeg(data, size, out)
        elif data[:8] == _PNG:
            _check_png(data)
            image = _pillow(data, "PNG", size)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            image = _pillow(data, "WEBP", size)
        else:
            raise CorruptSample(f"image: not a JPEG, PNG or WebP (begins with {bytes(data[:12])!r})")
    except (CorruptSample, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of every type for bad bytes: ValueError, OSError, SyntaxError ...
        raise CorruptSample(f"image: {' '.join(str(error).split()) or type(error).__name__}") from error
    if image is not None:
        out[...] = np.asarray(image, dtype=np.uint8)
    return out


def decode_caption(data: bytes | memoryview, ext: str) -> str:
    """Return the text of a ``txt`` member, or the ``"caption"`` of a ``json`` one, without surrounding white space.

    Raises:
        CorruptSample: not UTF-8, no such key, or empty.
    """
    try:
        text = str(data, "utf-8")
        text = text if ext == "txt" else json.loads(text)["caption"]
        text = text.strip()
        text.encode("utf-8")  # JSON can spell half of a surrogate pair
    except UnicodeError as error:
        raise CorruptSample("caption: not UTF-8") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptSample("caption: no text under 'caption' in the JSON") from error
    if not text:
        raise CorruptSample("caption: empty")
    return str(text)


def _jpeg(data: bytes | memoryview, size: int, out: npt.NDArray[np.uint8]) -> Image.Image | None:
    """Return the picture, or None if it was decoded straight into ``out``."""
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(width, height)
    if colorspace in ("CMYK", "YCCK"):  # simplejpeg has no colour conversion for these
        return _pillow(data, "JPEG", size)
    turned = _has_exif(data)
    if (height, width) == (size, size) and not turned:
        simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out, strict=True)
        return None
    pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=size, min_width=size, strict=True)
    image = _resize(Image.fromarray(pixels), size)
    if not turned:
        return image
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as header:
        rotation = _ROTATIONS.get(header.getexif().get(_ORIENTATION, 1))
    return image if rotation is None else image.transpose(rotation)  # after the resize: the result is a square anyway


def _has_exif(data: bytes | memoryview) -> bool:
    """Return whether a segment before the pixels is Exif. Searching the bytes for it would take ten times as long."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _START_OF_SCAN:
        if data[at + 1] == _EXIF and data[at + 4 : at + 10] == b"Exif\0\0":
            return True
        # A marker may have fill bytes in front; every other segment states its length.
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _pillow(data: bytes | memoryview, kind: str, size: int) -> Image.Image:
    with warnings.catch_warnings():  # Pillow warns below our own limit, which is checked next
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(io.BytesIO(data), formats=[kind])
    with opened as image:
        _check_pixels(*image.size)
        image.load()
        return _resize(to_rgb(ImageOps.exif_transpose(image)), size)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode that Pillow decodes to RGB; transparency is composited on white."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion differs between versions
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _resize(image: Image.Image, size: int) -> Image.Image:
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def _check_pixels(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise CorruptSample(f"image: {width} x {height} pixels, more than {MAX_PIXELS} in all")


def _check_png(data: bytes | memoryview) -> None:
    at = len(_PNG)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        if zlib.crc32(data[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise CorruptSample("image: damaged PNG (wrong CRC)")
        if data[at + 4 : at + 8] == b"IEND":
            return
        at = end
    raise CorruptSample("image: truncated PNG")
