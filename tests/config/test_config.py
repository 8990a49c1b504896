"""Settings: validation with one clear line, round trip, and the reference page."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamoe.config import dump_config, load_config
from megamoe.config.reference import reference_page
from megamoe.core.errors import UserError
from megamoe.model.size import model_size
from tests.training import ROOT


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("modle.moe.experts=8", "unknown key modle; did you mean model?"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("train.global_batch=10.5", "train.global_batch"),
        ("train.micro_batch=7", "train.micro_batch 7 does not divide"),
        ("model.vision.patch_size=15", "patch_size 15 does not divide image_size 224"),
        ("model.moe.top_k=9", "top_k 9 is more than experts 8"),
        ("optim.lr=nan", "optim.lr"),
        ("optim.lr", "write it as KEY=VALUE"),
        ("train.steps.more=1", "train.steps"),
        ("data.sequence_length=64", "data.sequence_length 64 has no room"),
        ("run.name=../evil", "run.name"),
    ],
)
def test_wrong_settings_are_one_line_that_names_the_field(empty: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(empty, [override])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_that_python_cannot_spell_reads_back_equal(empty: Path, tmp_path: Path) -> None:
    config = load_config(empty, ["checkpoint.async=true"])
    assert config.checkpoint.in_background and "  async: true\n" in dump_config(config)
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    with pytest.raises(UserError, match=r"did you mean checkpoint\.async\?"):
        load_config(empty, ["checkpoint.asinc=true"])


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("run: !!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(path)


def test_the_last_override_of_a_key_wins_and_the_resolved_config_reads_back_equal(empty: Path, tmp_path: Path) -> None:
    config = load_config(empty, ["optim.lr=1", "optim.lr=2e-3", "data.train=[a, b]", "run.dir=x/y"])
    assert config.optim.lr == 2e-3 and [each.shards for each in config.data.train] == [["a", "b"]]
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize("name", ["demo", "1b"])
def test_shipped_configs_load(name: str) -> None:
    load_config(ROOT / "configs" / f"{name}.yaml")


def test_1b_is_a_billion_parameters_and_sparse() -> None:
    size = model_size(load_config(ROOT / "configs/1b.yaml"))
    assert size.parameters >= 1.0e9
    assert size.active_parameters < size.parameters / 3


def test_the_reference_page_is_that_of_the_config() -> None:
    page = (ROOT / "docs/config.md").read_text()
    assert page == reference_page(), "run: python -m megamoe.config.reference > docs/config.md"


@pytest.mark.parametrize("time", ["24:00:00", "90", "1-00:00:00", "30:00"])
def test_a_time_limit_is_what_is_written(time: str, tmp_path: Path) -> None:
    """YAML 1.1 would read 24:00:00 as 86400, in which SLURM sees minutes."""
    path = tmp_path / "config.yaml"
    path.write_text(f"launch: {{slurm: {{time: {time}}}}}\n")
    assert load_config(path).launch.slurm.time == time
    assert load_config(path, [f"launch.slurm.time={time}"]).launch.slurm.time == time
