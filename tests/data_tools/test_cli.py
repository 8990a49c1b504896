"""`megamoe data synth|tokenizer|index` from the command line."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from data_tools.scenes.scene import CORRUPTIONS
from data_tools.verbs.synth import synthesize
from megamoe.commands.data.group import data
from megamoe.core.errors import DataError, UserError
from megamoe.data.sample.decode import CorruptSample, decode_image
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.index import load_index
from megamoe.data.shards.sequential import Sample, read_captions, read_samples


def run(*arguments: object) -> Result:
    return CliRunner().invoke(data, [str(each) for each in arguments])


def synth(out: Path, samples: int = 50, *options: object) -> Path:
    result = run("synth", out, "--samples", samples, "--seed", 3, "--validation", 10, *options)
    assert result.exit_code == 0, result.output
    return out


def contents(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    return found


def digests(folder: Path) -> dict[str, str]:
    shards = sorted(folder.rglob("*.tar"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, level: int) -> None:
    first, second = (digests(synth(tmp_path / name, 50, "--level", level, "--shard-size", 20)) for name in "ab")
    assert first == second
    shards = [*(f"train/{n:05d}.tar" for n in range(3)), "validation/00000.tar", "combinations/00000.tar"]
    assert set(first) == set(shards)


def test_a_sample_depends_neither_on_shard_size_nor_on_how_many_there_are(tmp_path: Path) -> None:
    small = contents(synth(tmp_path / "a", 50, "--shard-size", 7) / "train")
    large = contents(synth(tmp_path / "b", 60, "--shard-size", 1000) / "train")
    assert len(small) == 150 and small.items() <= large.items()


def test_samples_are_laion_style(tmp_path: Path) -> None:
    found = contents(synth(tmp_path / "s", 20, "--image-size", 48) / "train")
    record = json.loads(found["000000004.json"])
    assert record["caption"] == found["000000004.txt"].decode()
    assert (record["width"], record["height"], record["level"]) == (48, 48, 1)
    assert " ".join(record["objects"][0][key] for key in ("size", "colour", "shape")) in record["caption"]
    assert record["place"] in record["caption"]
    assert decode_image(found["000000004.jpg"], 48).shape == (48, 48, 3)


def test_spoilt_pictures_are_as_many_as_asked_and_each_is_found(tmp_path: Path) -> None:
    out = synth(tmp_path / "s", 400, "--corrupt", 0.1, "--image-size", 32)
    found = contents(out / "train")
    kinds = []
    for name in (name for name in found if name.endswith(".json")):
        kind = json.loads(found[name]).get("corrupt")
        image = found[name.replace(".json", ".jpg")]
        if kind is None:
            decode_image(image, 32)
        else:
            kinds.append(kind)
            with pytest.raises(CorruptSample):
                decode_image(image, 32)
    assert set(kinds) == set(CORRUPTIONS) and 20 <= len(kinds) <= 60
    assert not any("corrupt" in json.loads(v) for k, v in contents(out / "validation").items() if k.endswith("json"))


def test_shards_of_an_earlier_set_are_not_mixed_in(tmp_path: Path) -> None:
    out = synth(tmp_path / "s", 50, "--shard-size", 10)
    synth(out, 50, "--shard-size", 10)
    result = run("synth", out, "--samples", 20, "--seed", 3, "--shard-size", 10)
    assert isinstance(result.exception, DataError)
    assert str(result.exception).startswith(f"{out}/train/00002.tar: not part of this set (2 shards); remove it")


def test_a_dry_run_of_synth_and_tokenizer_writes_nothing_and_says_what_it_would(tmp_path: Path) -> None:
    options = ("--samples", 50, "--seed", 3, "--validation", 10, "--shard-size", 20, "--json")
    would = json.loads(run("synth", tmp_path / "s", *options, "--dry-run").stdout)
    assert not (tmp_path / "s").exists() and would["dry_run"]
    did = json.loads(run("synth", tmp_path / "s", *options).stdout)
    assert did == would | {"dry_run": False} and did["train"] == 50
    assert [Path(shard) for shard in did["shards"]] == [
        *sorted((tmp_path / "s/train").glob("*.tar")),
        tmp_path / "s/validation/00000.tar",
        tmp_path / "s/combinations/00000.tar",
    ]
    options = (tmp_path / "s/train", tmp_path / "t", "--vocab-size", 300, "--json")
    would = json.loads(run("tokenizer", *options, "--dry-run").stdout)
    assert would == {"model": f"{tmp_path}/t.model", "shards": 3, "dry_run": True} and not (tmp_path / "t.model").exists()
    did = json.loads(run("tokenizer", *options).stdout)
    assert did["pieces"] == 300 and did["fingerprint"] == Tokenizer(tmp_path / "t.model").fingerprint and did["lost"] == []
    too_small = run("tokenizer", tmp_path / "s/train", tmp_path / "t", "--vocab-size", 5, "--dry-run")
    assert isinstance(too_small.exception, UserError)


def test_indexes_of_replaced_shards_go_with_them(tmp_path: Path) -> None:
    out = synth(tmp_path / "s")
    assert run("index", out / "train").exit_code == 0
    synth(out)
    assert not list(out.rglob("*.idx"))


def test_a_killed_run_leaves_only_whole_shards(tmp_path: Path) -> None:
    out = tmp_path / "s"
    job = multiprocessing.get_context("fork").Process(
        target=synthesize, args=(out,), kwargs={"samples": 100_000, "seed": 0, "shard_size": 200}
    )
    job.start()
    limit = time.monotonic() + 20
    while len(list(out.glob("train/*.tar"))) < 2 and time.monotonic() < limit:
        time.sleep(0.02)
    assert job.pid is not None
    job.kill()
    job.join()
    assert job.exitcode == -signal.SIGKILL
    shards = sorted(out.glob("train/*.tar"))
    assert len(shards) >= 2
    assert f"{200 * len(shards)} samples" in run("index", out / "train").output


def test_the_tokenizer_is_deterministic_and_reads_every_caption(tmp_path: Path) -> None:
    out = synth(tmp_path / "s", 300)
    results = [run("tokenizer", out / "train", tmp_path / name, "--vocab-size", 400) for name in ("a", "b.model")]
    assert results[0].output == f"{tmp_path}/a.model: 400 pieces\n" and results[1].exit_code == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    tokenizer = Tokenizer(tmp_path / "a.model")
    assert tokenizer.size == 400
    for caption in read_captions([str(out / "train")]):
        assert tokenizer.decode(tokenizer.encode(caption)) == caption


def test_a_vocabulary_larger_than_the_captions_allow_says_what_was_reached(tmp_path: Path) -> None:
    result = run("tokenizer", synth(tmp_path / "s") / "train", tmp_path / "t", "--vocab-size", 4000)
    size = Tokenizer(tmp_path / "t.model").size
    assert result.exit_code == 0 and size < 4000
    assert result.output == f"{tmp_path}/t.model: {size} pieces (the captions have no more; 4000 were asked for)\n"


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    result = run("tokenizer", synth(tmp_path / "s") / "train", tmp_path / "t", "--vocab-size", 100)
    assert isinstance(result.exception, UserError) and "--vocab-size 100: the minimum is 261" in str(result.exception)


def test_index_writes_beside_the_shard_or_into_a_folder(tmp_path: Path) -> None:
    out = synth(tmp_path / "s", 40, "--shard-size", 20) / "train"
    assert run("index", out, "--out", tmp_path / "index").output.endswith("2 shards, 40 samples\n")
    assert not list(out.glob("*.idx")) and len(list((tmp_path / "index").glob("*.tar.idx"))) == 2
    assert load_index(out / "00001.tar", tmp_path / "index").samples == 20
    assert run("index", out).output.endswith("2 shards, 40 samples\n")
    assert load_index(out / "00001.tar", None).samples == 20


def test_index_names_each_unusable_shard_and_indexes_the_others(tmp_path: Path) -> None:
    out = synth(tmp_path / "s", 60, "--shard-size", 20) / "train"
    for name, size in (("00000.tar", 5000), ("00002.tar", 512)):
        (out / name).write_bytes((out / name).read_bytes()[:size])
    result = run("index", out)
    assert isinstance(result.exception, DataError) and result.exit_code != 0
    assert str(result.exception) == "2 of 3 shards cannot be used; see the lines above"
    assert "00000.tar: truncated at byte 5000" in result.output and "00002.tar: truncated at byte 512" in result.output
    assert [path.name for path in out.glob("*.idx")] == ["00001.tar.idx"]


def test_evaluation_reads_samples_in_order_and_reports_the_lost(tmp_path: Path) -> None:
    out = synth(tmp_path / "s", 100, "--corrupt", 0.1, "--shard-size", 30) / "train"
    lost: list[str] = []
    read: list[Sample] = list(read_samples([str(out)], None, 32, on_lost=lambda name, _: lost.append(name)))
    assert len(read) + len(lost) == 100 and lost
    assert [sample.id for sample in read] == sorted(sample.id for sample in read)
    assert read[0].image.shape == (32, 32, 3) and read[0].caption.startswith("a ")
    assert len(list(read_samples([str(out)], None, 32, limit=7, on_lost=lambda *_: None))) == 7
    assert not list(out.glob("*.idx"))  # reading writes nothing


def test_lost_samples_are_logged_where_nobody_counts_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = synth(tmp_path / "s", 50, "--corrupt", 0.2) / "train"
    used = len(list(read_samples([str(out)], None, 32)))
    assert used < 50 and len(caplog.messages) == 50 - used
    assert caplog.messages[0].startswith("sample 00000.tar#0000")
