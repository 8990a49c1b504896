"""Pictures and captions: good ones are decoded correctly, bad ones are detected."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from megamoe.data.sample.decode import MAX_PIXELS, CorruptSample, decode_caption, decode_image

LEFT_RED = np.zeros((40, 60, 3), np.uint8)
LEFT_RED[:, :30], LEFT_RED[:, 30:] = (220, 20, 20), (20, 20, 220)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(side: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True}), ("WEBP", {"quality": 90})],
)
def test_each_format_gives_a_square_of_the_right_colours(kind: str, options: dict[str, object]) -> None:
    pixels = decode_image(encoded(Image.fromarray(LEFT_RED), kind, **options), 20)
    assert pixels.shape == (20, 20, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[:, :8].astype(int) - (220, 20, 20)).max() < 12
    assert np.abs(pixels[:, 12:].astype(int) - (20, 20, 220)).max() < 12


@pytest.mark.parametrize("side", [32, 224, 256, 300, 512])
def test_jpegs_scaled_in_the_dct_look_as_pillow_scales_them(side: int) -> None:
    data = encoded(photo(side), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decode_image(data, 224) - expected).mean() < 3


def test_a_picture_of_the_right_size_is_taken_as_it_is() -> None:
    image = photo(64)
    assert np.array_equal(decode_image(encoded(image, "PNG"), 64), np.asarray(image))
    data = encoded(image, "JPEG")
    assert np.array_equal(decode_image(data, 64), simplejpeg.decode_jpeg(data))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_of_other_colour_models_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (32, 32), (90, 90, 90)).convert(mode)
    assert np.abs(decode_image(encoded(image, "JPEG", quality=95), 16).astype(int) - 90).max() <= 4


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    palette = Image.new("P", (8, 8), 0)
    for kind in ("PNG", "WEBP"):
        assert (decode_image(encoded(clear, kind, **({"lossless": True} if kind == "WEBP" else {})), 8) == 255).all()
    assert decode_image(encoded(half, "PNG"), 8)[0, 0].tolist() == [255, 127, 127]
    assert (decode_image(encoded(palette, "PNG", transparency=0), 8) == 255).all()
    assert (decode_image(encoded(clear.convert("LA"), "PNG"), 8) == 255).all()


def test_sixteen_bit_grey_keeps_its_range() -> None:
    ramp = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    pixels = decode_image(encoded(Image.fromarray(ramp), "PNG"), 64)
    assert np.array_equal(pixels[..., 0], (ramp >> 8).astype(np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    base = photo(64).crop((0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98} if kind == "JPEG" else {"lossless": True}  # PNG takes no notice
    upright = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's numbers of the transpositions
    expected = base.transpose(Image.Transpose(upright[orientation])) if orientation in upright else base
    pixels = decode_image(encoded(base, kind, exif=exif, **options), 32)
    assert np.abs(pixels.astype(int) - np.asarray(expected.resize((32, 32), Image.Resampling.BICUBIC))).mean() < 6


JPEG = encoded(photo(64), "JPEG", quality=90)
PNG = encoded(photo(64), "PNG")
WEBP = encoded(photo(64), "WEBP", quality=90)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"<!DOCTYPE html>404", b"GIF89a" + bytes(50), b"\xff\xd8\xff", b"\xff\xd8\xff\xe0 not really"),
        *(JPEG[:-2], JPEG[: len(JPEG) // 2], JPEG[:200], JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2)),
        *(PNG[:-4], PNG[: len(PNG) // 2], PNG[:20], PNG[:-12], WEBP[:-30], WEBP[:20], b"RIFF\0\0\0\0WEBP"),
    ],
    ids=lambda data: f"{bytes(data[:6])!r}-{len(data)}",
)
def test_what_is_cut_or_no_picture_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptSample, match=r"^image: ") as raised:
        decode_image(data, 32)
    assert "\n" not in str(raised.value)


def test_every_flipped_bit_of_a_png_is_found() -> None:
    for at in range(8, len(PNG), 7):
        damaged = bytearray(PNG)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(CorruptSample):
            decode_image(bytes(damaged), 32)


@pytest.mark.parametrize("marker", [b"\xff\xd9", b"\xff\xc4", b"\xff\xd0"])
def test_overwritten_bytes_in_a_jpeg_are_found(marker: bytes) -> None:
    middle = len(JPEG) // 2
    with pytest.raises(CorruptSample):
        decode_image(JPEG[:middle] + marker * 3 + JPEG[middle + 6 :], 32)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8193, 40_000])
def test_bombs_are_refused_by_their_header(side: int) -> None:
    assert side * side > MAX_PIXELS
    frame = JPEG.index(b"\xff\xc0")
    jpeg = JPEG[: frame + 5] + struct.pack(">HH", side, side) + JPEG[frame + 9 :]
    for data in (jpeg, png_header(side, side)):
        with pytest.raises(CorruptSample):
            decode_image(data, 32)


def test_captions_are_stripped_and_strict() -> None:
    assert decode_caption("  a café\n".encode(), "txt") == "a café"
    assert decode_caption(json.dumps({"caption": " x "}).encode(), "json") == "x"


@pytest.mark.parametrize(
    ("data", "ext", "reason"),
    [
        (b"\xff\xfe", "txt", "not UTF-8"),
        (b" \n", "txt", "empty"),
        (b"", "txt", "empty"),
        (b"{}", "json", "no text under"),
        (b'{"caption": 3}', "json", "no text under"),
        (b'{"caption": null}', "json", "no text under"),
        (b"[1", "json", "no text under"),
        (b'{"caption": "\\ud800"}', "json", "not UTF-8"),
    ],
)
def test_bad_captions_are_corrupt(data: bytes, ext: str, reason: str) -> None:
    with pytest.raises(CorruptSample, match=f"^caption: {reason}"):
        decode_caption(data, ext)
