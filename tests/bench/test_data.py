"""`megamoe bench data` measures what it says: real readers over real shards, and ratios of its own figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import simplejpeg

from megamoe.bench import loader as data
from megamoe.bench.pictures import picture, write_shards
from tests.training import megamoe


def test_figures_are_printed_and_written_and_the_ratios_are_theirs(tmp_path: Path) -> None:
    done = megamoe(
        "bench", "data", "--folder", "b", "--samples", "600", "--rounds", "1", "--side", "256", "--json", "f.json",
        folder=tmp_path,
    )  # fmt: skip
    result = json.loads((tmp_path / "f.json").read_text())
    rates = result["samples_per_second"]
    assert result["side"] == 256
    assert sorted(rates) == ["decode_limit", "ours", "shared_limit", "webdataset_pillow", "webdataset_simplejpeg"]
    assert min(rates.values()) > 0 and 25 < result["kilobytes_per_picture"] < 50
    for ratio, peer in (("decode_limit",) * 2, ("shared_limit",) * 2, ("webdataset", "webdataset_pillow")):
        assert result[f"ratio_{ratio}"] == pytest.approx(rates["ours"] / rates[peer])
        assert f"ratio_{ratio}" in done.stdout


def test_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    one, other = (write_shards(tmp_path / name, 5, per_shard=3) for name in "ab")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


@pytest.mark.parametrize("read", [data._pillow, data._simplejpeg])
@pytest.mark.parametrize("side", [224, 500])
def test_peers_give_pictures_of_any_size_at_that_of_ours(read: data.Decode, side: int) -> None:
    ours = data.decode_image(simplejpeg.encode_jpeg(picture(1, side)), data.SIDE)
    theirs = read(simplejpeg.encode_jpeg(picture(1, side)))
    assert theirs.shape == ours.shape and abs(theirs.numpy().astype(int) - ours).mean() < 3
