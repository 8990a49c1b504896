"""The tar walk sees what Python's tarfile sees, and notices every cut and every damaged header."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.core.errors import DataError
from megamoe.data.shards.index import build_index
from megamoe.data.shards.tar import checksum_is_right, open_for_walk, walk
from tests.data.shard_factory import sample, write_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


class Place(NamedTuple):
    name: str
    offset: int
    size: int


def members(path: Path) -> list[Place]:
    file, state = open_for_walk(path)
    with file:
        return [Place(*member[:3]) for member in walk(path, file, state.st_size)]


def by_tarfile(path: Path) -> list[Place]:
    with tarfile.open(path) as tar:
        return [Place(info.name, info.offset_data, info.size) for info in tar if info.isreg()]


part = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=70)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.lists(part, min_size=1, max_size=4), st.integers(0, 2000)), min_size=1, max_size=6),
)
def test_members_are_those_of_tarfile(format: int, files: list[tuple[list[str], int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        try:
            write_tar(path, [("/".join(parts), b"\xab" * size) for parts, size in files], format)
        except ValueError:  # ustar has no room for the name
            return
        assert members(path) == by_tarfile(path)


@pytest.mark.parametrize("format", FORMATS)
def test_folders_links_and_long_names_are_handled(tmp_path: Path, format: int) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.REGTYPE, "folder/" + "n" * 90 + "/x.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, 700 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        link = tarfile.TarInfo("x.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "l" * (150 if format != tarfile.USTAR_FORMAT else 20)
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("last.txt"))
    assert members(path) == by_tarfile(path)
    assert [member.size for member in members(path)] == [700, 0]


def test_global_pax_records_apply_to_all_that_follow(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by hand"}) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    assert members(path) == by_tarfile(path)


def test_sizes_beyond_octal_are_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:  # a file with a hole: nothing of this size is written
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + info.size + 1024)
    assert members_of_sparse_file(path, 512 + info.size) == [Place("big.jpg", 512, 9 << 30)]


def members_of_sparse_file(path: Path, end: int) -> list[Place]:
    file, _ = open_for_walk(path)
    with file:
        return [Place(*member[:3]) for member in walk(path, file, end + 1024)]


WHOLE = [member for n in range(3) for member in sample(n)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tar(tmp_path_factory.mktemp("whole") / "a.tar", WHOLE, tarfile.PAX_FORMAT).read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_cut_anywhere_is_found(whole: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(whole)
        last = by_tarfile(path)[-1]
        end = last.offset + -(-last.size // 512) * 512 + 1024  # behind the two zero blocks
        boundaries = [member.offset - 512 for member in by_tarfile(path)] + [end - 1024, end - 512]
        inside = st.integers(0, end - 1)
        cut = data.draw(st.one_of(st.sampled_from(boundaries), inside, inside.map(lambda n: n // 512 * 512)))
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="truncated at byte") as raised:
            build_index(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_padding_after_the_end_may_be_missing(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    last = by_tarfile(path)[-1]
    path.write_bytes(whole[: last.offset + -(-last.size // 512) * 512 + 1024])
    assert build_index(path).samples == 3


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_header_is_found(whole: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(whole)
        header = data.draw(st.sampled_from([member.offset - 512 for member in by_tarfile(path)]))
        # not the checksum field itself: what follows its digits is free
        at = header + data.draw(st.one_of(st.integers(0, 147), st.integers(156, 511)))
        damaged = bytearray(whole)
        damaged[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged header at byte|not a tar file|does not allow random access"):
            build_index(path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "truncated at byte 0"),
        (b"<html>" * 200, "not a tar file"),
        (b"\x1f\x8b" + bytes(600), "a compressed tar"),
        (bytes(10240), "no samples"),
    ],
)
def test_what_is_no_tar_is_said_to_be_none(tmp_path: Path, content: bytes, line: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=line):
        build_index(path)


def test_two_tars_joined_are_refused_since_readers_see_one(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="more data after its end"):
        build_index(path)


def test_a_single_zero_block_in_the_middle_is_damage(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    second = by_tarfile(path)[1].offset - 512
    path.write_bytes(whole[:second] + bytes(512) + whole[second:])
    with pytest.raises(DataError, match="one zero block instead of two"):
        build_index(path)


def test_a_missing_tar_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.tar: cannot be opened"):
        build_index(tmp_path / "gone.tar")


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf() + bytes(1024))
    with pytest.raises(DataError, match="sparse file at byte 0"):
        build_index(path)


@given(st.one_of(st.binary(min_size=512, max_size=512), st.binary(max_size=300).map(lambda data: data.ljust(512, b"\0"))))
def test_the_checksum_is_the_plain_sum_for_any_header(header: bytes) -> None:
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    for off, right in ((0, True), (1, False), (-1, False), (65521, False)):
        field = b"%06o\0 " % (total + off)
        assert checksum_is_right(header[:148] + field + header[156:]) is right
