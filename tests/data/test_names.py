"""Lists of names: compressed and found again, repeated ones detected, signatures of URLs ignored."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.config.data import DataConfig
from megamoe.core.errors import DataError
from megamoe.core.urls import unsigned
from megamoe.data.shards.catalog import DataSet, Source, data_fingerprint
from megamoe.data.shards.expand import expand_shards, iter_shards
from megamoe.data.shards.from_config import open_data_set
from megamoe.data.shards.index import index_path
from megamoe.data.shards.labels import ShardLabels, shard_labels
from megamoe.data.shards.names import ShardNames, name_hashes, repeated

S3 = "X-Amz-Algorithm=AWS4&X-Amz-Credential={0}&X-Amz-Expires=900&X-Amz-Signature={0}"
AZURE = "sv=2024&sr=b&st={0}&se={0}&sp=r&sig={0}"
CLOUDFRONT = "Expires={0}&Signature={0}&Key-Pair-Id=K"


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 1000])
def test_names_come_back_as_they_were(count: int) -> None:
    names = [f"s3://laion/{n:06d}.tar" for n in range(count)]
    if count:
        names[-1] = os.fsdecode(b"/data/caf\xe9 \xff.tar")  # not UTF-8, as file names may be
    kept = ShardNames(iter(names))
    assert list(kept) == names and len(kept) == count and [kept[n] for n in range(count)] == names
    assert kept[-3:] == names[-3:] and list(pickle.loads(pickle.dumps(kept))) == names
    with pytest.raises(IndexError):
        kept[count]


def test_names_of_a_large_set_are_small() -> None:
    names = ShardNames(iter_shards(["s3://laion2b-en/shards/{000000..049999}.tar"]))
    assert len(names) == 50_000 and names[49_999].endswith("/049999.tar")
    assert len(pickle.dumps(names)) < 250_000


def test_names_whose_numbers_are_equal_by_chance_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("expand", "labels"):
        monkeypatch.setattr(f"megamoe.data.shards.{module}.repeated", lambda hashes: frozenset(hashes.tolist()))
    names = [f"s3://a/{n}.tar" for n in range(5)]
    assert expand_shards(names) == names and shard_labels(names) == [f"{n}.tar" for n in range(5)]
    with pytest.raises(DataError, match=r"3\.tar: named twice"):
        expand_shards([*names, names[3]])


def test_repeated_numbers_are_those_of_names_that_come_twice() -> None:
    assert repeated(name_hashes(["a", "b", "a", "c", "b", "a"])) == {hash("a"), hash("b")}
    assert repeated(name_hashes([])) == frozenset()


def test_a_shard_in_two_sources_is_named_with_both() -> None:
    config = DataConfig.model_validate(
        {"train": [{"shards": ["s3://a/{0..9}.tar"], "name": "one"}, {"shards": ["s3://a/7.tar"], "name": "two"}]}
    )
    with pytest.raises(DataError, match=r"shard s3://a/7.tar: is in the sources one and two"):
        open_data_set(config, Path("index"))


@pytest.mark.parametrize("query", [S3, AZURE, CLOUDFRONT, f"versionId=3&{S3}", S3.replace("Amz", "Goog").lower()])
def test_a_url_that_is_signed_anew_names_the_same_shard(query: str) -> None:
    old, new = (f"https://host/a.tar?{query.format(secret)}" for secret in ("abc", "xyz"))
    assert unsigned(old) == unsigned(new) == f"https://host/a.tar{'?versionId=3' if 'versionId' in query else ''}"
    fingerprints = [data_fingerprint(DataSet([Source("0", [url, "s3://b/a.tar"])])) for url in (old, new)]
    assert fingerprints[0] == fingerprints[1]
    assert shard_labels([old, "https://host/a.tar?x=1"]) == shard_labels([new, "https://host/a.tar?x=1"])
    assert index_path(old, Path("i")) == index_path(new, Path("i"))
    with pytest.raises(DataError, match=r"a\.tar\?\*\*\*: named twice"):
        expand_shards([old, new])


@pytest.mark.parametrize("query", ["sp=3", "page=1&expires=never", "versionId=3", "policy=x&se=4"])
def test_other_parameters_count(query: str) -> None:
    url = f"https://host/a.tar?{query}"
    assert unsigned(url) == url
    one, other = (data_fingerprint(DataSet([Source("0", [f"{url}{n}"])])) for n in (1, 2))
    assert one != other


def test_labels_of_equal_file_names_are_small_and_the_same_in_every_process() -> None:
    sets = [ShardNames(iter_shards([f"s3://{name}/{{00000..29999}}.tar"])) for name in "ab"]
    labels = pickle.dumps(ShardLabels(*sets, ["s3://c/other.tar"]))
    assert len(labels) < 300_000
    program = """
import pickle, sys
labels = pickle.load(sys.stdin.buffer)
print(*(labels(f"s3://{name}.tar") for name in ("a/00000", "b/29999", "c/other")))"""
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        said = subprocess.run(
            [sys.executable, "-c", program], input=labels, env=environment, capture_output=True, check=True
        )
        assert said.stdout.split() == [b"s3://a/00000.tar", b"s3://b/29999.tar", b"other.tar"]
