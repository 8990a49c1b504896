"""Pictures that we did not draw: PNGs with transparency and the names that people gave them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import ROOT, megamoe, metrics

EMOJI = ROOT.parent / "shared/data/noto-emoji"


@pytest.mark.skipif(not EMOJI.exists(), reason=f"the emoji shards are not in {EMOJI}")
def test_the_demo_model_learns_names_of_emoji_with_nothing_but_settings_changed(tmp_path: Path) -> None:
    megamoe("data", "tokenizer", str(EMOJI), "emoji", "--vocab-size", "1024", folder=tmp_path)
    megamoe(
        "train", str(ROOT / "configs/demo.yaml"), "--nproc", "4", "run.name=emoji", f"data.train={EMOJI}",
        "data.validation=[]", "data.tokenizer=emoji.model", "model.decoder.vocab_size=1024", "train.steps=40",
        "optim.warmup=10", "metrics.tensorboard=false", folder=tmp_path,
    )  # fmt: skip
    records = metrics(tmp_path / "runs/emoji")
    assert records[0]["lm_loss"] > 6, "near the logarithm of 1,024 pieces before anything is learnt"
    assert records[-1]["lm_loss"] < 3.5
    assert records[-1]["lost"] == 0 and records[-1]["samples"] > 40 * 16
