"""The figures of an evaluation are right, and lie where people and the report look for them."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megamoe.checkpoint import LoadedModel, load_model
from megamoe.core.errors import CheckpointError, DataError, UserError
from megamoe.core.packed_batch import PackedBatch
from megamoe.data.sample.pack import PackShape, SequenceBuilder
from megamoe.data.shards.index import learn_index
from megamoe.data.shards.sequential import read_samples
from megamoe.evaluate import caption as caption_module
from megamoe.evaluate.caption import evaluate_caption
from megamoe.evaluate.results import read_results, results_folder, write_results
from megamoe.report.run_page import write_report
from tests.data.shard_factory import jpeg, write_tar
from tests.evaluate.conftest import LEARNT, shard
from tests.training import megamoe


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may write to."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def training_loss(source: Path, data: Path) -> float:
    """Mean loss of the caption tokens with each sample packed alone, by what training packs and computes."""
    loaded = load_model(source)
    model, length = loaded.config.model, loaded.config.data.sequence_length
    shape = PackShape(length, 1, model.vision.image_size, model.vision.patches)
    total, targets = 0.0, 0
    for sample in read_samples([str(data)], None, model.vision.image_size, on_lost=lambda name, reason: None):
        builder = SequenceBuilder(shape, loaded.tokenizer)
        builder.next_picture[...] = sample.image
        builder.add(loaded.tokenizer.encode(sample.caption))
        text = torch.from_numpy(builder.text)[None]
        with torch.no_grad():
            total += float(loaded.model(torch.from_numpy(builder.pixels)[None], text)[0])
        targets += PackedBatch.of(text).targets
    return total / targets


def test_exact_match_counts_captions_that_are_equal_and_lost_samples_are_named(own_run: Path, held_out: Path) -> None:
    result = evaluate_caption(own_run, [str(held_out)])
    assert result["exact_match"] == 6 / 10 and result["samples"] == 10
    assert result["lost"] == 2
    incomplete, cut = sorted(result["lost_samples"], reverse=True)
    assert incomplete.startswith("00001.tar#00301: ") and "no caption" in incomplete
    assert cut.startswith("00001.tar#00300: image: ")
    assert (result["name"], result["step"], result["data"]) == ("validation", 30, [str(held_out)])


def ruled(run: Path, rule: str, limit: int) -> LoadedModel:
    """The run as if it had these settings for bad shards."""
    loaded = load_model(run)
    data = loaded.config.data.model_copy(update={"bad_shards": rule, "max_bad_shards": limit})
    return replace(loaded, config=loaded.config.model_copy(update={"data": data}))


@pytest.mark.parametrize("damage", ["cut", "gone bad", "no tar"])
def test_a_shard_that_cannot_be_used_is_left_out_by_the_rule_of_the_run(
    own_run: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    shards = Path(shutil.copytree(held_out, tmp_path / "shards"))
    if damage == "gone bad":
        learn_index(shards / "00000.tar", None)
    os.truncate(shards / "00000.tar", 700)
    if damage == "no tar":
        (shards / "00000.tar").write_text("<html>404</html>" * 100)
    for rule, limit, said in (
        ("stop", 1, "00000.tar"),
        ("quarantine", 0, "data.max_bad_shards 0: 1 shards cannot be used"),
    ):
        monkeypatch.setattr(caption_module, "load_model", lambda _, rule=rule, limit=limit: ruled(own_run, rule, limit))
        with pytest.raises(DataError, match=said):
            evaluate_caption(own_run, [str(shards)])
    monkeypatch.setattr(caption_module, "load_model", lambda _: ruled(own_run, "quarantine", 1))
    result = evaluate_caption(own_run, [str(shards)])
    assert result["samples"] == 4 and result["lost"] == 2
    (bad,) = result["bad_shards"]
    assert bad.startswith("00000.tar: ") and "\n" not in bad


def test_loss_is_that_of_training_on_the_same_samples_long_captions_cut_alike(own_run: Path, held_out: Path) -> None:
    result = evaluate_caption(own_run, [str(held_out)])
    assert result["loss"] == pytest.approx(training_loss(own_run, held_out), rel=1e-5)


def test_without_data_the_validation_shards_of_the_run_are_taken(
    own_run: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(held_out, tmp_path / "shards/validation")
    monkeypatch.chdir(tmp_path)
    assert evaluate_caption(own_run)["samples"] == 10
    assert evaluate_caption(own_run)["data"] == ["shards/validation"]


def test_without_data_and_validation_shards_an_error_names_both(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(own_run)
    data = loaded.config.data.model_copy(update={"validation": []})
    loaded = replace(loaded, config=loaded.config.model_copy(update={"data": data}))
    monkeypatch.setattr(caption_module, "load_model", lambda source: loaded)
    with pytest.raises(UserError, match=r"data\.validation .* --data"):
        evaluate_caption(own_run)


@pytest.mark.parametrize("batch", [1, 3])
def test_size_of_the_batches_changes_no_result(own_run: Path, held_out: Path, batch: int) -> None:
    whole = evaluate_caption(own_run, [str(held_out)])
    examples = (own_run / "eval/validation.jsonl").read_text()
    parts = evaluate_caption(own_run, [str(held_out)], batch=batch)
    assert parts == whole | {"loss": pytest.approx(whole["loss"], rel=1e-5)}
    assert (own_run / "eval/validation.jsonl").read_text() == examples


def test_eval_json_has_the_figures_and_the_examples_show_what_the_model_saw(own_run: Path, held_out: Path) -> None:
    result = evaluate_caption(own_run, [str(held_out)])
    assert json.loads((own_run / "eval.json").read_text()) == result
    samples = list(read_samples([str(held_out)], None, 32, on_lost=lambda name, reason: None))
    lines = [json.loads(line) for line in (own_run / "eval/validation.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [sample.id for sample in samples]
    for line, sample in zip(lines, samples, strict=True):
        assert set(line) == {"id", "caption", "generated", "match", "image"}
        assert line["caption"] == sample.caption
        assert line["match"] == (line["generated"].strip() == sample.caption)
        picture = Image.open(io.BytesIO(base64.b64decode(line["image"])))
        assert picture.format == "PNG" and np.array_equal(np.asarray(picture), sample.image)
    assert sum(line["match"] for line in lines) == 6


def test_no_more_than_64_examples_are_kept(own_run: Path, tmp_path: Path) -> None:
    shard(tmp_path / "many/00000.tar", [LEARNT] * 70)
    assert evaluate_caption(own_run, [str(tmp_path / "many")])["samples"] == 70
    assert len((own_run / "eval/validation.jsonl").read_text().splitlines()) == 64


def test_other_splits_stand_beside_validation_and_survive_each_other(own_run: Path, held_out: Path) -> None:
    other = evaluate_caption(own_run, [str(held_out)], name="other", limit=3)
    assert json.loads((own_run / "eval.json").read_text()) == {"splits": {"other": other}}
    main = evaluate_caption(own_run, [str(held_out)], limit=5)
    third = evaluate_caption(own_run, [str(held_out)], name="third", limit=7)
    again = evaluate_caption(own_run, [str(held_out)], name="other", limit=8)
    assert json.loads((own_run / "eval.json").read_text()) == main | {"splits": {"other": again, "third": third}}
    assert (other["samples"], main["samples"], third["samples"], again["samples"]) == (3, 5, 7, 8)
    assert {path.name for path in (own_run / "eval").iterdir()} == {"validation.jsonl", "other.jsonl", "third.jsonl"}


def test_the_report_reads_what_an_evaluation_writes(own_run: Path, held_out: Path) -> None:
    evaluate_caption(own_run, [str(held_out)])
    evaluate_caption(own_run, [str(held_out)], name="other", limit=4)
    page = write_report(own_run).read_text(encoding="utf-8")
    assert "60.0%" in page and "100.0%" in page and "a red squar" in page


def test_a_checkpoint_has_its_figures_in_its_run_or_beside_it(own_run: Path, held_out: Path, tmp_path: Path) -> None:
    checkpoint = own_run / "checkpoints/step-00000030"
    files = sorted(path.name for path in checkpoint.iterdir())
    evaluate_caption(checkpoint, [str(held_out)], limit=2)
    assert read_results(own_run)["samples"] == 2
    bare = Path(shutil.copytree(checkpoint, tmp_path / "models/good"))
    evaluate_caption(bare, [str(held_out)], limit=3)
    assert read_results(tmp_path / "models")["samples"] == 3
    assert read_results(own_run)["samples"] == 2
    assert files == sorted(path.name for path in checkpoint.iterdir()) == sorted(path.name for path in bare.iterdir())


def test_results_folder_of_a_relative_path(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_run / "checkpoints/step-00000030")
    assert results_folder(Path()) == own_run.resolve()


def test_a_loss_that_is_not_finite_is_null(own_run: Path, held_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(source: Path) -> LoadedModel:
        loaded = load_model(source)
        loaded.model.layers[-1].out.weight.fill_(torch.nan)
        return loaded

    monkeypatch.setattr(caption_module, "load_model", diverged)
    assert evaluate_caption(own_run, [str(held_out)])["loss"] is None
    assert read_results(own_run)["loss"] is None


def test_data_without_a_usable_sample_is_a_user_error_that_says_why(own_run: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "bad/00000.tar", [("7.jpg", jpeg(7)[:100]), ("7.txt", b"cut")])
    with pytest.raises(UserError, match=r"bad: has no sample that can be used \(1 lost, the first: 00000.tar#7: image"):
        evaluate_caption(own_run, [str(tmp_path / "bad")])
    with pytest.raises(UserError, match="nowhere"):
        evaluate_caption(own_run, [str(tmp_path / "nowhere")])
    assert not (own_run / "eval.json").exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b"])
def test_a_name_that_cannot_be_a_file_is_a_user_error(own_run: Path, held_out: Path, name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        evaluate_caption(own_run, [str(held_out)], name=name)


def test_a_folder_without_a_checkpoint_is_a_user_error(tmp_path: Path, held_out: Path) -> None:
    with pytest.raises(CheckpointError):
        evaluate_caption(tmp_path, [str(held_out)])


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_damaged_eval_json_is_a_user_error_and_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(UserError, match="remove it"):
        write_results(tmp_path, {"name": "validation"}, [])
    assert (tmp_path / "eval.json").read_text() == content


def test_the_command_prints_the_figures_and_generates_captions(own_run: Path, held_out: Path, tmp_path: Path) -> None:
    done = megamoe("eval", str(own_run), "--data", str(held_out), "--limit", "6", folder=tmp_path)
    assert "1.0000" in done.stdout and str(own_run / "eval.json") in done.stdout
    (tmp_path / "picture.jpg").write_bytes(jpeg(400))
    assert megamoe("generate", str(own_run), "picture.jpg", folder=tmp_path).stdout == f"{LEARNT}\n"
