"""`megamoe data build` from a folder of pictures: keys, captions, pictures, resuming after a kill."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import webdataset
from PIL import Image

from megamoe.core.errors import DataError
from megamoe.data.sample.decode import decode_image
from tests.data.shard_factory import jpeg, write_tar
from tests.data_tools.build_kit import build, members, metadata, picture, rows, shard_bytes, stats


def put(folder: Path, name: str, image: bytes, caption: str | None = None) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    if caption is not None:
        path.with_name(f"{name.rpartition('.')[0].rpartition('/')[2]}.txt").write_text(caption)


def folder(root: Path, count: int) -> Path:
    for n in range(count):
        put(root, f"{n:04d}.jpg", jpeg(n), f"picture {n}")
    return root


def test_dots_and_unicode_in_names_never_mix_samples(tmp_path: Path) -> None:
    names = [
        "photo.1.jpg", "photo.2.jpg", "photo.jpg", "photo.1.x.png", "v1.0/cat.jpg", "v1.1/cat.jpg", "v1_0/cat.jpg",
        "Überfluß.jpeg", "猫 写真.webp", "a b.JPG", "a_b.jpg", "__hidden__/x.jpg", "we'ird\n$(name).jpg",
    ]  # fmt: skip
    for name in names:
        kind = {"png": "PNG", "webp": "WEBP"}.get(name.rpartition(".")[2], "JPEG")
        put(tmp_path / "in", name, picture(kind), f"caption of {name!r}")
    assert build(tmp_path / "in", tmp_path / "out").exit_code == 0
    read = list(webdataset.WebDataset(str(tmp_path / "out/00000.tar"), shardshuffle=False))
    assert len(read) == len(names)
    for sample in read:
        assert sample["txt"].decode() == f"caption of {json.loads(sample['json'])['path']!r}"
        assert len({"jpg", "png", "webp"} & set(sample)) == 1
        assert "." not in sample["__key__"] and "\n" not in sample["__key__"]
    assert {"photo", "Überfluß", "a_b", "v1_0/cat"} <= {sample["__key__"] for sample in read}


def test_two_pictures_of_one_stem_are_two_samples(tmp_path: Path) -> None:
    put(tmp_path / "in", "a.jpg", picture("JPEG"), "both")
    put(tmp_path / "in", "a.png", picture("PNG"))
    assert build(tmp_path / "in", tmp_path / "out").exit_code == 0
    assert [row["path"] for row in metadata(tmp_path / "out")] == ["a.jpg", "a.png"]
    assert len({row["key"] for row in rows(tmp_path / "out")}) == 2


def test_json_beside_a_picture_is_kept_and_gives_the_caption_where_there_is_no_txt(tmp_path: Path) -> None:
    put(tmp_path / "in", "a.jpg", jpeg(1), "from the txt")
    put(tmp_path / "in", "b.jpg", jpeg(2))
    extra = {"similarity": 0.31, "tags": ["x", {"y": None}], "width": 7, "nan": float("nan")}
    for name in "ab":
        (tmp_path / f"in/{name}.json").write_text(json.dumps({"caption": "from the json", **extra}))
    assert build(tmp_path / "in", tmp_path / "out").exit_code == 0
    a, b = metadata(tmp_path / "out")
    assert (a["caption"], b["caption"]) == ("from the txt", "from the json")
    assert a["similarity"] == 0.31 and a["tags"] == ["x", {"y": None}] and a["nan"] is None
    assert (a["source_width"], a["width"], a["original_height"]) == (7, 32, 32)
    assert members(tmp_path / "out")["b.txt"] == b"from the json"


def test_good_bytes_are_kept_as_they_are_whatever_the_file_is_called(tmp_path: Path) -> None:
    images = {
        "cmyk.jpg": picture("JPEG", "CMYK"),
        "alpha.jpg": picture("PNG", "RGBA"),
        "web.png": picture("WEBP"),
        "turned.jpeg": picture("JPEG", exif=_orientation(6)),
    }
    for name, image in images.items():
        put(tmp_path / "in", name, image, "x")
    assert build(tmp_path / "in", tmp_path / "out").exit_code == 0
    found = members(tmp_path / "out")
    assert found["cmyk.jpg"] == images["cmyk.jpg"] and found["alpha.png"] == images["alpha.jpg"]
    assert found["web.webp"] == images["web.png"] and found["turned.jpg"] == images["turned.jpeg"]
    assert all((row["width"], row["height"]) == (40, 20) for row in metadata(tmp_path / "out"))


@pytest.mark.parametrize(
    ("mode", "sides"), [("keep_ratio", (32, 16)), ("center_crop", (16, 16)), ("border", (16, 16)), ("no", (40, 20))]
)
def test_resize_modes_are_those_of_img2dataset(tmp_path: Path, mode: str, sides: tuple[int, int]) -> None:
    put(tmp_path / "in", "a.png", picture("PNG"), "x")
    assert build(tmp_path / "in", tmp_path / "out", "--resize-mode", mode, "--image-size", 16).exit_code == 0
    (row,) = metadata(tmp_path / "out")
    found = members(tmp_path / "out")
    image = Image.open(io.BytesIO(found.get("a.jpg") or found["a.png"]))
    assert image.size == (row["width"], row["height"]) == sides
    assert (row["original_width"], row["original_height"]) == (40, 20)
    if mode == "border":
        pixels = np.asarray(image)
        assert pixels[0].min() > 240 and pixels[-1].min() > 240 and pixels[8].min() < 240


def test_resized_pictures_are_turned_upright_and_laid_on_white(tmp_path: Path) -> None:
    put(tmp_path / "in", "alpha.png", picture("PNG", "RGBA"), "x")
    put(tmp_path / "in", "cmyk.jpg", picture("JPEG", "CMYK"), "x")
    put(tmp_path / "in", "turned.jpg", picture("JPEG", exif=_orientation(6)), "x")
    assert build(tmp_path / "in", tmp_path / "out", "--resize-mode", "keep_ratio", "--image-size", 20).exit_code == 0
    found = members(tmp_path / "out")
    assert np.asarray(Image.open(io.BytesIO(found["alpha.jpg"]))).min() > 250
    assert Image.open(io.BytesIO(found["turned.jpg"])).size == (20, 40)
    difference = decode_image(found["cmyk.jpg"], 20).astype(int) - decode_image(picture("JPEG", "CMYK"), 20).astype(int)
    assert np.abs(difference).mean() < 4


def test_a_strip_that_would_be_resized_to_gigabytes_is_lost(tmp_path: Path) -> None:
    put(tmp_path / "in", "strip.png", picture("PNG", size=(60_000, 1)), "x")
    put(tmp_path / "in", "well.png", picture("PNG"), "x")
    assert build(tmp_path / "in", tmp_path / "out", "--resize-mode", "keep_ratio").exit_code == 1
    assert [row["status"] for row in rows(tmp_path / "out")] == ["failed_to_resize", "success"]


def test_what_is_lost_is_counted_and_named(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 10)
    cut = jpeg(1, 64)
    put(source, "cut.jpg", cut[: len(cut) // 2], "x")
    put(source, "page.jpg", b"<html>no</html>", "x")
    put(source, "bomb.png", _bomb(), "x")
    put(source, "silent.jpg", jpeg(2))
    put(source, "blank.jpg", jpeg(2), " \n")
    put(source, "latin.jpg", jpeg(2))
    (source / "latin.txt").write_bytes(b"caf\xe9")
    put(source, "list.jpg", jpeg(2), "x")
    (source / "list.json").write_text("[1]")
    put(source, "large.png", picture("PNG", size=(300, 300), compress_level=0), "x")
    result = build(source, tmp_path / "out", "--max-bytes", 20_000)
    assert result.exit_code == 1
    assert (
        "10 samples in 1 shard; 8 of 18 lost" in result.output and "the first: blank.jpg: caption: empty" in result.output
    )
    failed = {
        row["path"]: (row["status"], row["error_message"]) for row in rows(tmp_path / "out") if row["status"] != "success"
    }
    assert {path: status for path, (status, _) in failed.items()} == {
        "cut.jpg": "failed_to_resize",
        "page.jpg": "failed_to_resize",
        "bomb.png": "failed_to_resize",
        "silent.jpg": "no_caption",
        "blank.jpg": "no_caption",
        "latin.jpg": "no_caption",
        "list.jpg": "failed_to_download",
        "large.png": "failed_to_download",
    }
    assert all(message.startswith(f"{path}: ") for path, (_, message) in failed.items())
    (totals,) = stats(tmp_path / "out")
    kinds = ("count", "successes", "failed_to_download", "failed_to_resize", "no_caption")
    assert [totals[kind] for kind in kinds] == [18, 10, 2, 3, 3]
    assert sum(totals["status_dict"].values()) == 18 and totals["status_dict"]["success"] == 10


def test_max_lost_says_how_much_may_be_lost(tmp_path: Path) -> None:
    put(folder(tmp_path / "in", 9), "bad.jpg", b"junk", "x")
    assert build(tmp_path / "in", tmp_path / "out", "--max-lost", 0.05).exit_code == 1
    assert build(tmp_path / "in", tmp_path / "out", "--max-lost", 0.1).exit_code == 0


def test_captions_optional_keeps_pictures_without(tmp_path: Path) -> None:
    put(tmp_path / "in", "a.jpg", jpeg(1), "one")
    put(tmp_path / "in", "b.jpg", jpeg(2))
    assert build(tmp_path / "in", tmp_path / "out", "--captions-optional").exit_code == 0
    assert list(members(tmp_path / "out")) == ["a.jpg", "a.txt", "a.json", "b.jpg", "b.json"]


def test_hidden_files_and_pipes_are_no_pictures(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 1)
    put(source, ".cache/x.jpg", jpeg(1), "x")
    put(source, "._0000.jpg", b"AppleDouble")
    os.mkfifo(source / "pipe.jpg")
    assert build(source, tmp_path / "out").exit_code == 0
    assert len(rows(tmp_path / "out")) == 1


def test_two_processes_make_the_shards_that_one_makes(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 45)
    for processes in (1, 2):
        assert build(source, tmp_path / str(processes), "--shard-size", 10, "--processes", processes).exit_code == 0
    one = shard_bytes(tmp_path / "1")
    assert len(one) == 10 and one == shard_bytes(tmp_path / "2")


def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 600)
    options = ("--shard-size", 20, "--resize-mode", "border", "--image-size", 400)
    call = [
        sys.executable,
        "-c",
        "from megamoe.commands.data.group import data; data()",
        "build",
        source,
        tmp_path / "out",
        *options,
    ]
    job = subprocess.Popen([*map(str, call), "--processes", "2"], cwd=Path(__file__).parents[2])
    limit = time.monotonic() + 30
    while len(list((tmp_path / "out").glob("*_stats.json"))) < 3 and time.monotonic() < limit:
        time.sleep(0.005)
    workers = psutil.Process(job.pid).children(recursive=True)
    job.kill()
    assert job.wait() == -signal.SIGKILL
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=10)[1]  # nobody goes on writing
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_stats.json")}
    assert 3 <= len(done) < 30
    (tmp_path / "out/.00007.tar.1.tmp").write_bytes(b"left by the killed one")
    result = build(source, tmp_path / "out", *options)
    assert result.exit_code == 0 and f"600 samples in 30 shards ({len(done)} made before)" in result.output
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert not list((tmp_path / "out").glob(".*"))
    assert build(source, tmp_path / "whole", *options).exit_code == 0
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


def test_an_output_begun_otherwise_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", 4)
    assert build(source, tmp_path / "out").exit_code == 0
    other = build(source, tmp_path / "out", "--resize-mode", "border")
    assert isinstance(other.exception, DataError)
    assert "begun with another pictures: resize_mode (no, now border); remove it" in str(other.exception)
    put(source, "new.jpg", jpeg(9), "new")
    assert "begun with another source: fingerprint" in str(build(source, tmp_path / "out").exception)
    write_tar(tmp_path / "foreign/00000.tar", [("a.jpg", jpeg(1))])
    assert "holds shards that are not of this build" in str(build(source, tmp_path / "foreign").exception)
    assert "is the source" in str(build(source, source).exception)


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    result = build(folder(tmp_path / "in", 25), tmp_path / "out", "--dry-run", "--shard-size", 10)
    assert "25 samples for 3 shards" in result.output and not (tmp_path / "out").exists()
    result = build(tmp_path / "in", tmp_path / "out", "--dry-run", "--shard-size", 10, "--json")
    assert json.loads(result.stdout) == {"format": "folder", "count": 25, "shards": 3}


def test_shards_need_no_building(tmp_path: Path) -> None:
    assert build(folder(tmp_path / "in", 4), tmp_path / "out").exit_code == 0
    message = str(build(tmp_path / "out", tmp_path / "again").exception)
    assert "shards already (1 tars, as img2dataset writes them), nothing to build" in message
    assert "megamoe data index" in message and "megamoe data validate" in message
    assert "a shard already" in str(build(tmp_path / "out/00000.tar", tmp_path / "again").exception)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "holds neither pictures" in str(build(tmp_path / "in", tmp_path / "out").exception)
    assert "no such file or folder" in str(build(tmp_path / "not", tmp_path / "out").exception)


def _orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def _bomb() -> bytes:
    small = bytearray(picture("PNG"))
    small[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    small[29:33] = zlib.crc32(small[12:29]).to_bytes(4, "big")
    return bytes(small)
