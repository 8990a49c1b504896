"""Indexes: what is a sample, what is lost and named, and when an index is too old to be trusted."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

import pytest

from megamoe.core.errors import DataError
from megamoe.data.shards.catalog import Catalog, DataSet, Source, data_fingerprint
from megamoe.data.shards.index import ShardIndex, build_index, index_path, learn_index, load_index, write_index
from megamoe.data.shards.storage import Storage
from tests.data.shard_factory import make_set, sample, write_tar

NOTO = Path(__file__).parents[2] / "../shared/data/noto-emoji"


def samples_by_tarfile(path: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for info in tar:
            key, ext = info.name.split(".", 1)
            found.setdefault(key, {})[ext] = tar.extractfile(info).read()  # type: ignore[union-attr]
    return found


def check_against_tarfile(path: Path) -> None:
    index, storage = build_index(path), Storage()
    expected = samples_by_tarfile(path)
    assert [index.key(i) for i in range(index.samples)] == list(expected)
    for i in range(index.samples):
        entry = index.sample(i)
        members = expected[entry.key]
        assert dict(zip(index.members(i), storage.read(str(path), list(index.members(i).values())), strict=True)) == members
        assert index.members(i)[entry.image_ext] == entry.image and index.members(i)[entry.text_ext] == entry.text
    storage.close()


def test_offsets_lead_to_the_bytes_that_tarfile_reads(tmp_path: Path) -> None:
    check_against_tarfile(write_tar(tmp_path / "a.tar", [m for n in range(20) for m in sample(n)], tarfile.PAX_FORMAT))


@pytest.mark.skipif(not NOTO.is_dir(), reason="the emoji shards are not there")
def test_real_shards_are_indexed_like_tarfile_reads_them() -> None:
    check_against_tarfile(sorted(NOTO.glob("*.tar"))[-1])


def test_keys_and_extensions_are_split_as_webdataset_does(tmp_path: Path) -> None:
    names = ["./a/b.c/x.JPEG", "./a/b.c/x.txt", "./a/b.c/y.seg.png", "./a/b.c/y.png", "./a/b.c/y.txt"]
    path = write_tar(tmp_path / "a.tar", [(name, b"1") for name in [*names, "__meta__/z.jpg", "dir/.x.jpg", "noext"]])
    index = build_index(path)
    assert [index.sample(i)[0] for i in range(2)] == ["./a/b.c/x", "./a/b.c/y"]
    assert [index.sample(i).image_ext for i in range(2)] == ["jpeg", "png"]
    assert index.samples == 2 and not index.incomplete and not index.duplicates


def test_what_is_held_out_is_known_without_looking_at_each_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_tar(tmp_path / "a.tar", [member for n in range(200) for member in sample(n)])
    learn_index(shard, None)
    monkeypatch.setattr(ShardIndex, "key", None)
    data = DataSet([Source("0", [str(shard)])], held_out=0.25)
    hashes = [hashlib.blake2b(f"{n:05d}".encode(), digest_size=8).digest() for n in range(200)]
    assert Catalog(data, Storage()).count(0, 0) == sum(each < b"\xc0" for each in hashes) < 200


def test_json_serves_as_caption_where_there_is_no_txt(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.json", b'{"caption": "x"}'), ("b.jpg", b"2"), ("b.json", b'{"title": "x"}')]
    index = build_index(write_tar(tmp_path / "a.tar", [*members, ("c.json", b"{"), ("c.jpg", b"3"), ("c.txt", b"c")]))
    assert [index.sample(i).text_ext for i in range(index.samples)] == ["json", "txt"]
    assert index.incomplete == [("b", "no caption")]


def test_lost_samples_are_counted_and_named(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.txt", b"x"), *sample(1), ("a.txt", b"x"), *sample(1), ("d.cls", b"0")]
    path = write_tar(tmp_path / "a.tar", members)
    learn_index(path, None)
    index = load_index(path, None)
    assert index.samples == 1
    assert index.incomplete == [("a", "no caption"), ("b", "no picture"), ("d", "no picture and no caption")]
    assert index.duplicates == ["a", "00001"]
    catalog = Catalog(DataSet([Source("0", [str(path)])]), Storage())
    assert [name for name, _ in catalog.sample(0, 0, 0).lost] == [f"a.tar#{key}" for key in ("a", "b", "d", "a", "00001")]


def test_a_tar_without_a_whole_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no samples \(its first group 'a' has no caption\)"):
        build_index(write_tar(tmp_path / "a.tar", [("a.jpg", b"1")]))


def test_an_index_reads_back_as_it_was_built(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*sample(1), ("bild-ä.png", b"1"), ("bild-ä.txt", b"x"), ("z.txt", b"x")])
    built = build_index(path)
    write_index(built, index_path(path, None))
    loaded = load_index(path, None)
    assert loaded.header == built.header
    assert [loaded.sample(i) for i in range(2)] == [built.sample(i) for i in range(2)]
    assert loaded.incomplete == built.incomplete and loaded.sample(1).key == "bild-ä"


def test_equal_names_of_different_folders_have_indexes_of_their_own(tmp_path: Path) -> None:
    shards = [write_tar(tmp_path / name / "00000.tar", sample(n)) for n, name in enumerate("ab")]
    for shard in shards:
        learn_index(shard, tmp_path / "index")
    assert len(list((tmp_path / "index").iterdir())) == 2
    assert not list(tmp_path.glob("[ab]/*.idx"))
    catalog = Catalog(DataSet([Source("0", [str(shard) for shard in shards])], tmp_path / "index"), Storage())
    assert [catalog.sample(0, n, 0).id for n in range(2)] == [f"{shards[0]}#00000", f"{shards[1]}#00001"]


def test_the_index_beside_a_shard_wins(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", sample(0))
    learn_index(shard, None)
    learn_index(shard, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_an_index_older_than_its_shard_is_refused(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", sample(0))
    learn_index(shard, None)
    state = shard.stat()
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    for use in (lambda: load_index(shard, None), lambda: learn_index(shard, None)):
        with pytest.raises(DataError, match=rf"index {shard}.idx is older than its shard {shard}: run `megamoe data index"):
            use()
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns - 10**9))  # an older copy of the same size is the same
    assert load_index(shard, None).samples == 1
    write_tar(shard, [*sample(0), *sample(1), *[m for n in range(2, 9) for m in sample(n)]])
    os.utime(shard, ns=(0, 0))
    with pytest.raises(DataError, match="is older than its shard"):
        load_index(shard, None)


@pytest.mark.parametrize("damage", [lambda d: d[:100], lambda d: b"", lambda d: d[:-300] + bytes(300), lambda d: b"x" * 99])
def test_a_damaged_index_is_refused_with_the_remedy(tmp_path: Path, damage: object) -> None:
    shard = write_tar(tmp_path / "a.tar", sample(0))
    learn_index(shard, None)
    path = index_path(shard, None)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match="damaged; run `megamoe data index"):
        load_index(shard, None)


def test_a_missing_index_or_shard_is_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", sample(0))
    with pytest.raises(DataError, match="has no index; run `megamoe data index"):
        load_index(shard, None)
    learn_index(shard, None)
    shard.unlink()
    with pytest.raises(DataError, match=r"a.tar: cannot be read"):
        load_index(shard, None)


def test_the_fingerprint_tells_data_sets_apart_but_not_folders(tmp_path: Path) -> None:
    one = make_set(tmp_path / "a", [30, 2])
    assert data_fingerprint(one) == data_fingerprint(make_set(tmp_path / "b", [30, 2]))
    turned = DataSet([Source("0", one.sources[0].shards[::-1])])
    others = [make_set(tmp_path / "c", [2, 30]), make_set(tmp_path / "d", [30]), turned]
    assert len({data_fingerprint(each) for each in [one, *others]}) == 4
