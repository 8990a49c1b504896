"""`megamoe data dedup`: what is dropped, what is kept, and that the search for near hashes equals brute force."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from data_tools.similar.hamming import first_near
from data_tools.similar.perceptual import perceptual_hash
from megamoe.core.errors import DataError, UserError
from tests.data_tools.shaping import Members, full_sample, make_shards, outcome, photo, read_folder, read_tar, run


def sample(image: bytes, text: str = "a thing") -> Members:
    return {"jpg": image, "txt": text.encode(), "json": b'{"url": "x"}'}


def keys(folder: Path) -> list[str]:
    return [key for key, _ in read_folder(folder)]


def dropped(folder: Path) -> dict[str, tuple[str, str]]:
    lines = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    return {line["sample"]: (line["partner"], line["cause"]) for line in lines}


def changed(image: bytes, scale: float = 0.6, quality: int = 60, brightness: float = 1.1) -> bytes:
    """Return the same picture as a crawl finds it again: smaller, brighter, compressed harder."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(image)) as whole:
        small = whole.resize((int(whole.width * scale), int(whole.height * scale)), Image.Resampling.LANCZOS)
        ImageEnhance.Brightness(small).enhance(brightness).save(out, "JPEG", quality=quality)
    return out.getvalue()


def brute_force(hashes: list[int], distance: int, always_kept: int) -> list[int]:
    partners: list[int] = []
    for j, value in enumerate(hashes):
        near = (i for i in range(j) if partners[i] < 0 and (hashes[i] ^ value).bit_count() <= distance)
        partners.append(-1 if j < always_kept else next(near, -1))
    return partners


@st.composite
def clustered(draw: st.DrawFn) -> list[int]:
    """Make hashes of which many differ in few bits from others, also in chains."""
    hashes = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    for _ in range(draw(st.integers(0, 40))):
        value = draw(st.sampled_from(hashes))
        for bit in draw(st.lists(st.integers(0, 63), max_size=6)):
            value ^= 1 << bit
        hashes.append(value)
    return hashes


@settings(max_examples=300, deadline=None)
@given(clustered(), st.integers(0, 16), st.data())
def test_near_hashes_are_those_that_brute_force_finds(hashes: list[int], distance: int, data: st.DataObject) -> None:
    always_kept = data.draw(st.integers(0, len(hashes)))
    array: npt.NDArray[np.uint64] = np.array(hashes, dtype=np.uint64)
    assert first_near(array, distance, always_kept).tolist() == brute_force(hashes, distance, always_kept)


def test_of_a_chain_what_is_far_from_all_that_stay_stays() -> None:
    a, b, c = 0, 0b11, 0b1111  # a-b and b-c are near, a-c is not; b goes because of a, so nothing is left that c repeats
    assert first_near(np.array([a, b, c], dtype=np.uint64), 2).tolist() == [-1, 0, -1]


def test_a_large_set_is_searched_without_comparing_all_with_all() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 200_000, dtype=np.uint64)
    copies = hashes[:1000] ^ (np.uint64(1) << rng.integers(0, 64, 1000, dtype=np.uint64))
    found = first_near(np.concatenate([hashes, copies]), 3)
    assert (found[:200_000] == -1).all() and (found[200_000:] == np.arange(1000)).all()


@pytest.mark.parametrize("seed", range(8))
def test_the_hash_of_a_picture_survives_what_a_crawl_does_to_it(seed: int) -> None:
    image = photo(seed)
    values = [perceptual_hash(data) for data in (image, changed(image), photo(seed, 160, 120, "WEBP"))]
    others = [perceptual_hash(photo(other)) for other in range(100, 110)]
    assert None not in values and None not in others
    assert max((values[0] ^ value).bit_count() for value in values[1:]) <= 4  # type: ignore[operator]
    assert min((values[0] ^ other).bit_count() for other in others) > 10  # type: ignore[operator]


def test_a_picture_of_one_colour_has_no_hash() -> None:
    for colour in ((0, 0, 0), (255, 255, 255), (200, 30, 90)):
        out = io.BytesIO()
        Image.new("RGB", (64, 48), colour).save(out, "JPEG")
        assert perceptual_hash(out.getvalue()) is None


def test_of_equal_pictures_the_first_in_the_order_of_the_shards_stays(tmp_path: Path) -> None:
    a, b = photo(1), photo(2)
    shards = [
        [("z", sample(a, "one")), ("y", sample(b))],
        [("a", sample(a, "two")), ("b", sample(changed(a)))],
        [("c", sample(b))],
    ]
    found = outcome("dedup", make_shards(tmp_path / "s", shards), tmp_path / "o")
    assert keys(tmp_path / "o") == ["z", "y", "b"] and found["dropped"] == {"duplicate": 2}
    assert found["empty"] == ["00002.tar"]
    assert dropped(tmp_path / "o") == {
        "00001.tar#a": ("00000.tar#z", "duplicate"),
        "00002.tar#c": ("00000.tar#y", "duplicate"),
    }
    assert read_tar(tmp_path / "o/00000.tar") == shards[0]


def test_equal_pictures_with_other_captions_stay_if_captions_count(tmp_path: Path) -> None:
    a = photo(1)
    shards = [[("a", sample(a, "one")), ("b", sample(a, "two")), ("c", sample(a, " one\n"))]]
    outcome("dedup", make_shards(tmp_path / "s", shards), tmp_path / "o", "--of", "image+caption")
    assert keys(tmp_path / "o") == ["a", "b"]


def test_near_pictures_go_and_what_cannot_be_compared_stays(tmp_path: Path) -> None:
    a, b = photo(1), photo(2)
    flat = io.BytesIO()
    Image.new("RGB", (64, 64), (250, 250, 250)).save(flat, "PNG")
    damaged = a[: len(a) // 2]
    samples = [
        ("a", a),
        ("b", b),
        ("a2", changed(a)),
        ("f", flat.getvalue()),
        ("f2", flat.getvalue()),
        ("d", damaged),
        ("d2", damaged),
    ]
    shards = [[(key, sample(image)) for key, image in samples] + [("n", {"txt": b"no picture"})]]
    found = outcome("dedup", make_shards(tmp_path / "s", shards), tmp_path / "o", "--near")
    assert keys(tmp_path / "o") == ["a", "b", "f", "f2", "d", "d2", "n"]
    assert found["dropped"] == {"duplicate": 1} and found["kept_as"] == {"not_compared": 5}


@pytest.mark.parametrize("mode", ["--exact", "--near"])
def test_what_the_evaluation_set_shows_goes_and_the_evaluation_set_stays(tmp_path: Path, mode: str) -> None:
    a, b, c = (photo(seed) for seed in (1, 2, 3))
    shown = a if mode == "--exact" else changed(a)
    evaluation = make_shards(tmp_path / "e", [[("e0", sample(c)), ("e1", sample(shown)), ("e2", sample(shown))]])
    source = make_shards(tmp_path / "s", [[("a", sample(a)), ("b", sample(b)), ("a2", sample(a)), ("b2", sample(b))]])
    before = (evaluation / "00000.tar").read_bytes()
    found = outcome("dedup", source, tmp_path / "o", mode, "--against", evaluation)
    assert keys(tmp_path / "o") == ["b"] and found["read"] == 4
    assert found["dropped"] == {"in_evaluation_set": 2, "duplicate": 1}
    assert dropped(tmp_path / "o") == {
        "00000.tar#a": ("00000.tar#e1", "in_evaluation_set"),
        "00000.tar#a2": ("00000.tar#e1", "in_evaluation_set"),
        "00000.tar#b2": ("00000.tar#b", "duplicate"),
    }
    assert (evaluation / "00000.tar").read_bytes() == before


def test_a_damaged_evaluation_shard_is_a_loss_since_it_was_not_compared(tmp_path: Path) -> None:
    evaluation = make_shards(tmp_path / "e", [[(f"{n}", full_sample(n)) for n in range(10)]])
    shard = evaluation / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:9000])
    source = make_shards(tmp_path / "s", [[("a", full_sample(0)), ("b", full_sample(30))]])
    found = outcome("dedup", source, tmp_path / "o", "--against", evaluation, status=1)
    assert found["lost"] == 1 and found["lost_samples"][0][0] == "--against 00000.tar" and keys(tmp_path / "o") == ["b"]


def test_a_shard_in_both_sets_is_refused(tmp_path: Path) -> None:
    source = make_shards(tmp_path / "s", [[("a", full_sample(0))]])
    result = run("dedup", source, tmp_path / "o", "--against", source / "00000.tar")
    assert isinstance(result.exception, DataError) and "is in both sets" in str(result.exception)


@pytest.mark.parametrize("options", [("--distance", 3), ("--near", "--of", "image+caption")])
def test_options_that_would_do_nothing_are_refused(tmp_path: Path, options: tuple[object, ...]) -> None:
    source = make_shards(tmp_path / "s", [[("a", full_sample(0))]])
    assert isinstance(run("dedup", source, tmp_path / "o", *options).exception, UserError)
