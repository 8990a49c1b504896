"""Samples as the web gives them, through the loader: each is used as it looks, or lost, counted by cause and named."""

from __future__ import annotations

import io
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import DataSet, Source
from tests.data.pairs import Seen, grid, make_loader, pair, picture, see
from tests.data.shard_factory import Members, caption, write_tar
from tests.data.test_decode import png_header

STEPS = 12  # four lanes of three pictures: more than two epochs of every set here


def one_shard(folder: Path, *parts: Members) -> DataSet:
    members = [member for part in parts for member in part]
    return DataSet([Source("0", [str(write_tar(folder / "0.tar", members))])], folder / "index")


def seen_in(folder: Path, tokenizer: Tokenizer, *parts: Members, workers: int = 0) -> Seen:
    good = [pair(n) for n in range(100, 120)]
    with make_loader(one_shard(folder, *good[:10], *parts, *good[10:]), tokenizer, workers=workers) as loader:
        seen = see(loader, tokenizer, STEPS)
    assert {f"0.tar#{n:05d}" for n in range(100, 120)} <= set(seen.used), "a whole epoch and more"
    assert not set(seen.used) & set(seen.lost)
    return seen


def turned(n: int, orientation: int) -> bytes:
    """Store a picture as a camera held sideways does; upright it encodes ``n``."""
    stored = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(grid(n)).convert("RGB").transpose(stored[orientation]).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def on_nothing(n: int) -> bytes:
    """Draw dark squares on a transparent ground whose hidden colour is dark as well."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., 3] = np.where(grid(n) < 128, 255, 0)
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    return buffer.getvalue()


def deep_grey(n: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grid(n).astype(np.uint16) * 257).save(buffer, "PNG")
    return buffer.getvalue()


def test_unusual_pictures_are_seen_as_they_look(tmp_path: Path, tokenizer: Tokenizer) -> None:
    images = [
        picture(1, "PNG"),
        picture(2, "WEBP", quality=90),
        picture(3, mode="L"),
        picture(4, mode="CMYK", quality=95),
        picture(5, "PNG", mode="P"),
        on_nothing(6),
        deep_grey(7),
        turned(8, 3),
        turned(9, 6),
        turned(10, 8),
        picture(11, side=512),
        picture(12, progressive=True),
        picture(13, "PNG", mode="1"),
        picture(14, "PNG", mode="LA"),
    ]
    # all are called .jpg, whatever they are
    seen = seen_in(tmp_path, tokenizer, *[pair(n, image=image) for n, image in enumerate(images, 1)])
    assert not seen.lost
    assert {seen.numbers[f"0.tar#{n:05d}"] for n in range(1, 15)} == set(range(1, 15))


def damaged(data: bytes, at: float, *flips: int) -> bytes:
    out = bytearray(data)
    for flip in flips:
        out[int(len(out) * at) + flip] ^= 0x55
    return bytes(out)


def with_size(jpeg: bytes, side: int) -> bytes:
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", side, side) + jpeg[frame + 9 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes that the decoder ignores it
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_lost_with_their_reason(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    jpeg, png = picture(1), picture(1, "PNG")
    reasons: list[tuple[bytes, str]] = [
        (b"", "image: empty"),
        (b"<!DOCTYPE html><title>404</title>", "image: not a JPEG, PNG or WebP"),
        (b"GIF89a" + bytes(40), "image: not a JPEG, PNG or WebP"),
        (jpeg[: len(jpeg) // 2], "image: "),
        (jpeg[:-2], "image: "),
        (jpeg[:3], "image: "),
        (damaged(png, 0.5, 0), "image: damaged PNG"),
        (png[: len(png) // 2], "image: truncated PNG"),
        (with_size(jpeg, 40_000), "image: 40000 x 40000 pixels, more than"),
        (png_header(40_000, 40_000), "image: "),
        (png_header(10_000, 10_000), "image: 10000 x 10000 pixels, more than"),
    ]
    bad = [pair(n, image=image) for n, (image, _) in enumerate(reasons)]
    seen = seen_in(tmp_path, tokenizer, *bad, workers=workers)
    assert set(seen.lost) == {f"0.tar#{n:05d}" for n in range(len(bad))}
    for n, (_, reason) in enumerate(reasons):
        assert seen.lost[f"0.tar#{n:05d}"].startswith(reason)
        assert "\n" not in seen.lost[f"0.tar#{n:05d}"]
    assert seen.counters[0, "lost_image"] == len(seen.losses)


def test_bit_damage_in_a_jpeg_is_a_loss_or_still_the_same_picture(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """No decoder detects every flipped bit, but a picture that is used must still show the same number."""
    rng = np.random.default_rng(0)
    noisy = (grid(1, 64).astype(int)[..., None] + rng.integers(-20, 21, (64, 64, 3))).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    whole = buffer.getvalue()
    bad = [pair(1, key=f"bad{n}", image=damaged(whole, 0.4 + n / 60, 0, 7, 23, 40)) for n in range(30)]
    seen = seen_in(tmp_path, tokenizer, *bad)
    assert sum(name.startswith("0.tar#bad") for name in seen.lost) >= 20
    assert all(reason.startswith("image: ") for reason in seen.lost.values())


def test_bad_captions_are_lost_with_their_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [
        ("txt", b"", "caption: empty"),
        ("txt", b" \n\t", "caption: empty"),
        ("txt", b"caf\xe9", "caption: not UTF-8"),
        ("txt", b"\xff\xfea\0", "caption: not UTF-8"),
        ("json", b'{"caption": ""}', "caption: empty"),
        ("json", b'{"caption": "\\ud800"}', "caption: not UTF-8"),
        ("json", b'{"caption": "\xe9"}', "incomplete: no caption"),
        ("json", b'{"title": "x"}', "incomplete: no caption"),
        ("json", b"[" * 5000, "incomplete: no caption"),
    ]
    bad = [[(f"{n:05d}.jpg", picture(n)), (f"{n:05d}.{ext}", text)] for n, (ext, text, _) in enumerate(texts)]
    seen = seen_in(tmp_path, tokenizer, *bad)
    assert seen.lost == {f"0.tar#{n:05d}": reason for n, (_, _, reason) in enumerate(texts)}


def test_the_caption_of_a_json_is_that_of_its_picture(tmp_path: Path, tokenizer: Tokenizer) -> None:
    parts = [[(f"{n:05d}.json", f'{{"caption": "{caption(n)}"}}'.encode()), (f"{n:05d}.jpg", picture(n))] for n in range(5)]
    seen = seen_in(tmp_path, tokenizer, *parts)
    assert not seen.lost and {seen.numbers[f"0.tar#{n:05d}"] for n in range(5)} == set(range(5))


LONE = [("00001.jpg", picture(1)), ("00002.txt", caption(2).encode()), ("00003.jpg", picture(3))]
TORN = [*(pair(n)[0] for n in range(3)), *(pair(n)[1] for n in range(3))]  # all pictures first
CROSSED = [pair(1)[0], pair(2)[1], pair(2)[0], pair(1)[1]]
TWICE = [pair(1)[0], *pair(1)]  # a picture of another sample's name, then the sample


@pytest.mark.parametrize(
    ("members", "used", "lost"),
    [
        (LONE, [], [(1, "no caption"), (2, "no picture"), (3, "no caption")]),
        (TORN, [], [(n, why) for n in range(3) for why in ("no caption", "its key comes twice")]),
        (CROSSED, [2], [(1, "no caption"), (1, "its key comes twice")]),
        (TWICE, [], [(1, "no caption"), (1, "its key comes twice")]),
        ([*pair(1), *pair(1)], [1], [(1, "its key comes twice")]),
    ],
    ids=["lone", "torn", "crossed", "twice", "again"],
)
def test_members_that_do_not_stand_together_never_make_a_wrong_pair(
    tmp_path: Path, tokenizer: Tokenizer, members: Members, used: Sequence[int], lost: Sequence[tuple[int, str]]
) -> None:
    with make_loader(one_shard(tmp_path, *[pair(n) for n in range(100, 120)], members), tokenizer) as loader:
        seen = see(loader, tokenizer, STEPS)
    assert {name for name in seen.used if not name.startswith("0.tar#001")} == {f"0.tar#{n:05d}" for n in used}
    assert {(each.id, each.reason) for each in seen.losses} == {(f"0.tar#{n:05d}", f"incomplete: {why}") for n, why in lost}
    assert seen.counters[0, "lost_incomplete"] == len(seen.losses) > 0


def test_keys_with_dots_end_at_the_first_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    parts = [
        pair(1, key="a.b/00001"),
        pair(2, key="./v1.2/c.d/00002"),
        pair(3, key="00003"),
        [("00004.thumb.jpg", picture(9)), *pair(4)],  # a thumbnail is no picture of the sample
        pair(5, key="00005.v1"),
    ]
    seen = seen_in(tmp_path, tokenizer, *parts)
    numbers = {name: n for name, n in seen.numbers.items() if n < 100}
    assert numbers == {
        "0.tar#a.b/00001": 1,
        "0.tar#./v1.2/c.d/00002": 2,
        "0.tar#00003": 3,
        "0.tar#00004": 4,
    }
    assert seen.lost == {"0.tar#00005": "incomplete: no picture and no caption"}


def test_one_key_in_many_shards_is_as_many_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = []
    for shard in range(4):
        members = [member for n in range(8) for member in pair(shard * 8 + n, key=f"{n:05d}")]
        shards.append(str(write_tar(tmp_path / f"{shard}.tar", members)))
    with make_loader(DataSet([Source("0", shards)], tmp_path / "index"), tokenizer, workers=2) as loader:
        seen = see(loader, tokenizer, 10)
    assert seen.numbers == {f"{shard}.tar#{n:05d}": shard * 8 + n for shard in range(4) for n in range(8)}
    assert not seen.lost


def test_unusable_samples_are_counted_as_lost_once_an_epoch_and_evenly(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Otherwise the first samples of a shard would stop a run whose share of losses is far below data.max_corrupt."""
    stray = [[(f"stray{n}.jpg", picture(n))] for n in range(20)]
    data = one_shard(tmp_path, *[pair(n) for n in range(100, 180)], *stray)
    seen = Seen(tokenizer)
    with make_loader(data, tokenizer) as loader:
        for _ in range(18):
            seen.add(next(loader))
            # a quarter of those used, within three standard deviations of drawing half of 80 without replacement
            assert abs(len(seen.losses) - seen.used.total() / 4) < 6
    epochs = seen.used.total() / 80
    assert epochs > 2
    assert seen.lost == {f"0.tar#stray{n}": "incomplete: no caption" for n in range(20)}
    assert set(Counter(each.id for each in seen.losses).values()) <= {int(epochs), int(epochs) + 1}
