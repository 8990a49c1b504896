"""`megamoe data filter`: what is kept, and the name under which everything else is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.checks.conditions import picture_size
from megamoe.core.errors import DataError, UserError
from tests.data_tools.shaping import (
    digests,
    full_sample,
    make_shards,
    numbered,
    outcome,
    photo,
    read_folder,
    read_tar,
    run,
)


def of_pictures(folder: Path, pictures: dict[str, bytes]) -> Path:
    return make_shards(folder, [[(key, {"jpg": data, "txt": b"a thing"}) for key, data in pictures.items()]])


def of_captions(folder: Path, captions: dict[str, str]) -> Path:
    return make_shards(folder, [[(key, {"jpg": b"not looked at", "txt": text.encode()}) for key, text in captions.items()]])


def of_columns(folder: Path, columns: dict[str, str]) -> Path:
    return make_shards(folder, [[(key, {"jpg": b"", "json": text.encode()}) for key, text in columns.items()]])


def kept(folder: Path) -> list[str]:
    return [key for key, _ in read_folder(folder)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_sides_and_aspect_are_read_from_every_kind_of_picture(tmp_path: Path, kind: str) -> None:
    sizes = {"fits": (200, 100), "narrow": (200, 99), "large": (301, 150), "long": (300, 100), "edge": (300, 150)}
    source = of_pictures(tmp_path / "s", {key: photo(0, *size, kind) for key, size in sizes.items()})
    found = outcome("filter", source, tmp_path / "o", "--min-size", 100, "--max-size", 300, "--max-aspect", 2)
    assert found["dropped"] == {"too_small": 1, "too_large": 1, "aspect_ratio": 1}
    assert kept(tmp_path / "o") == ["fits", "edge"]


def test_only_the_header_of_a_picture_is_read(tmp_path: Path) -> None:
    whole = photo(0, 640, 480)
    assert picture_size(whole[: len(whole) // 2]) == (640, 480)
    source = of_pictures(tmp_path / "s", {"cut": whole[: len(whole) // 2], "none": b"GIF89a", "empty": b""})
    assert outcome("filter", source, tmp_path / "o", "--min-size", 10)["dropped"] == {"unreadable_picture": 2}
    assert kept(tmp_path / "o") == ["cut"]


def test_captions_are_measured_in_characters_without_white_space_around_them(tmp_path: Path) -> None:
    texts = {"five": " ääääö\n", "four": "abcd   ", "seven": "abcdefg", "six": "一二三四五六", "none": "  "}
    source = of_captions(tmp_path / "s", texts)
    found = outcome("filter", source, tmp_path / "o", "--min-caption-length", 5, "--max-caption-length", 6)
    assert found["dropped"] == {"caption_too_short": 1, "caption_too_long": 1, "no_caption": 1}
    assert kept(tmp_path / "o") == ["five", "six"]


def test_captions_come_from_the_json_where_there_is_no_text(tmp_path: Path) -> None:
    columns = {"long": '{"caption": "a thing"}', "short": '{"caption": "a"}', "none": "{}", "deep": "[" * 100_000}
    source = of_columns(tmp_path / "s", columns)
    found = outcome("filter", source, tmp_path / "o", "--min-caption-length", 2)
    assert kept(tmp_path / "o") == ["long"] and found["dropped"] == {"caption_too_short": 1, "no_caption": 2}


def test_captions_in_other_languages_are_dropped(tmp_path: Path) -> None:
    texts = {
        "en": "A plate of pasta with tomato sauce",
        "de": "Rotes Backsteinhaus zu verkaufen",
        "fr": "Chaussures de course pour femme",
        "ru": "Собака на пляже",
        "lines": "a dog on the beach\nwith a red ball",
        "long": "the quick brown fox jumps over the lazy dog " * 20,
    }
    source = of_captions(tmp_path / "s", texts)
    assert outcome("filter", source, tmp_path / "o", "--language", "en,de")["dropped"] == {"language": 2}
    assert kept(tmp_path / "o") == ["en", "de", "lines", "long"]


@pytest.mark.parametrize(("missing", "names"), [("drop", ["yes"]), ("keep", ["yes", *"abcdefg"])])
def test_what_is_no_number_is_missing_and_counted_as_such(tmp_path: Path, missing: str, names: list[str]) -> None:
    columns = {
        "yes": '{"similarity": 0.28, "punsafe": 0}',
        "no": '{"similarity": 0.2799, "punsafe": 0.1}',
        "unsafe": '{"similarity": 1, "punsafe": 0.5}',
        "a": '{"similarity": null, "punsafe": 0}',
        "b": '{"similarity": "0.9", "punsafe": 0}',
        "c": '{"similarity": NaN, "punsafe": 0}',
        "d": '{"similarity": true, "punsafe": 0}',
        "e": "[1, 2]",
        "f": "not json",
        "g": "[" * 100_000,
    }
    source = of_columns(tmp_path / "s", columns)
    conditions = ("--where", "similarity >= 0.28", "--where", "punsafe<0.5", "--missing", missing)
    found = outcome("filter", source, tmp_path / "o", *conditions)
    assert kept(tmp_path / "o") == names
    failed = {"not similarity>=0.28": 1, "not punsafe<0.5": 1}
    if missing == "drop":
        assert found["dropped"] == failed | {"missing similarity": 7} and found["kept_as"] == {}
    else:
        assert found["dropped"] == failed and found["kept_as"] == {"missing similarity": 7, "missing punsafe": 3}


@pytest.mark.parametrize(
    ("where", "numbers"),
    [("n>=2", [2, 3]), ("n<=1", [0, 1]), ("n>2", [3]), ("n<1e0", [0]), ("n==2", [2]), ("n!=2", [0, 1, 3])],
)
def test_every_operator_means_what_it_says(tmp_path: Path, where: str, numbers: list[int]) -> None:
    source = numbered(tmp_path / "s", [4])
    outcome("filter", source, tmp_path / "o", "--where", where)
    assert kept(tmp_path / "o") == [f"{n:05d}" for n in numbers]


def test_samples_keep_all_members_and_the_source_is_not_touched(tmp_path: Path) -> None:
    source = numbered(tmp_path / "s", [30, 5, 25])
    before = digests(source)
    found = outcome("filter", source, tmp_path / "o", "--where", "n>=40")
    assert digests(source) == before
    assert read_folder(tmp_path / "o") == [(f"{n:05d}", full_sample(n)) for n in range(40, 60)]
    assert [path.name for path in sorted((tmp_path / "o").glob("*.tar"))] == ["00002.tar"]
    assert found["empty"] == ["00000.tar", "00001.tar"]
    assert (
        "2 shards would be empty and were not written: 00000.tar, 00001.tar"
        in run("filter", source, tmp_path / "o", "--where", "n>=40").output
    )


def test_a_cut_shard_is_named_and_every_whole_sample_is_saved(tmp_path: Path) -> None:
    source = numbered(tmp_path / "s", [10, 10])
    shard = source / "00000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    result = run("filter", source, tmp_path / "o", "--where", "n>=0")
    assert result.exit_code == 1
    assert f"lost 00000.tar: shard {shard}: truncated at byte" in result.stderr
    found = outcome("filter", source, tmp_path / "o", "--where", "n>=0", status=1)
    assert found["lost"] == 1 and 13 <= found["kept"] < 20
    assert read_tar(tmp_path / "o/00000.tar") == [(f"{n:05d}", full_sample(n)) for n in range(found["kept"] - 10)]


def test_of_many_losses_the_first_are_named_and_the_result_holds_all(tmp_path: Path) -> None:
    source = make_shards(tmp_path / "s", [[(f"{n}", full_sample(n)) for n in [*range(30), *range(30)]]])
    result = run("filter", source, tmp_path / "o", "--where", "n>=0")
    assert result.stderr.count("its key comes twice") == 20
    assert f"lost 10 more; {tmp_path}/o/filter.json names all" in result.stderr
    assert len(json.loads((tmp_path / "o/filter.json").read_text())["result"]["lost_samples"]) == 30


def test_a_key_that_comes_twice_is_lost_and_named(tmp_path: Path) -> None:
    source = make_shards(tmp_path / "s", [[("a", full_sample(1)), ("b", full_sample(2)), ("a", full_sample(3))]])
    found = outcome("filter", source, tmp_path / "o", "--where", "n>=0", status=1)
    assert found["lost_samples"] == [["00000.tar#a", "its key comes twice"]] and kept(tmp_path / "o") == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no condition is given"),
        (("--missing", "keep"), "no condition is given"),
        (("--where", "similarity=0.3"), "not COLUMN OP NUMBER"),
        (("--where", "similarity>=high"), "not COLUMN OP NUMBER"),
        (("--where", "similarity>=nan"), "not COLUMN OP NUMBER"),
    ],
)
def test_requests_without_meaning_are_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("filter", numbered(tmp_path / "s", [2]), tmp_path / "o", *arguments)
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert not (tmp_path / "o").exists()


def test_a_language_that_is_no_code_is_refused(tmp_path: Path) -> None:
    result = run("filter", numbered(tmp_path / "s", [2]), tmp_path / "o", "--language", "English")
    assert result.exit_code == 2 and "ISO 639 codes" in result.output


def test_shards_of_one_name_do_not_fall_on_each_other(tmp_path: Path) -> None:
    both = f"{numbered(tmp_path / 'a', [2])}::{numbered(tmp_path / 'b', [2])}"
    result = run("filter", both, tmp_path / "o", "--where", "n>=0")
    assert isinstance(result.exception, DataError) and "two are called 00000.tar" in str(result.exception)


def test_the_request_and_the_result_are_kept(tmp_path: Path) -> None:
    outcome("filter", numbered(tmp_path / "s", [3]), tmp_path / "o", "--where", "n>=1")
    content = json.loads((tmp_path / "o/filter.json").read_text())
    assert content["request"]["where"] == [["n", ">=", 1.0]] and content["result"]["kept"] == 2
    assert not (tmp_path / "o/.filter").exists()
