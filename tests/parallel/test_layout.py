"""Layouts are planned and refused by arithmetic alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.config import parse_config
from megamoe.core.errors import UserError
from megamoe.model.size import model_size
from megamoe.parallel.layout import Layout, plan_layout
from megamoe.parallel.memory import predict_memory
from tests.training import ROOT, small_config


def _plan(ranks: int, **sections: dict[str, Any]) -> Layout:
    return plan_layout(parse_config(small_config(**sections), "test"), ranks)


@pytest.mark.parametrize(
    ("ranks", "sections", "words"),
    [
        (1, {"parallel": {"zero": 0}}, ["parallel.zero is 0", "parallel.zero=1"]),
        (4, {"parallel": {"zero": 3, "pipeline": 2}}, ["parallel.pipeline 2", "parallel.zero=1"]),
        (3, {"parallel": {"pipeline": 2}}, ["parallel.pipeline 2", "3 ranks"]),
        (2, {"parallel": {"expert": 4}}, ["parallel.expert 4", "parallel.expert=2"]),
        (3, {"parallel": {"expert": 3}, "train": {"global_batch": 9}}, ["model.moe.experts 8", "parallel.expert=2"]),
        (3, {}, ["train.global_batch 8", "train.global_batch=9"]),
        (2, {"parallel": {"expert": 2}, "model": {"vision": {"sparse_every": 0}, "decoder": {"sparse_every": 0}}},
         ["no block is sparse", "parallel.expert=1"]),
        (6, {"parallel": {"expert": 2, "pipeline": 3}, "model": {"vision": {"sparse_every": 0},
         "decoder": {"sparse_every": 2}}}, ["needs a sparse block in each stage", "parallel.pipeline=2"]),
    ],
)  # fmt: skip
def test_layouts_that_cannot_be_right_are_refused_with_the_remedy(
    ranks: int, sections: dict[str, dict[str, Any]], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        _plan(ranks, **sections)
    for word in words:
        assert word in str(error.value)


@given(pipeline=st.integers(1, 6), expert=st.sampled_from([1, 2, 4]), replicas=st.integers(1, 3))
def test_stages_cover_all_layers_once_and_hold_experts_where_they_must(pipeline: int, expert: int, replicas: int) -> None:
    data = expert * replicas
    config = parse_config(
        small_config(parallel={"pipeline": pipeline, "expert": expert}, train={"global_batch": 8 * data}), "test"
    )
    layout = plan_layout(config, pipeline * data)
    layers = model_size(config).layers
    assert layout.bounds[0] == 0 and layout.bounds[-1] == len(layers)
    for start, stop in zip(layout.bounds, layout.bounds[1:], strict=False):
        assert stop > start
        assert expert == 1 or any(layer.sparse for layer in layers[start:stop])
    for rank in range(layout.world_size):
        assert layout.stage(rank) * layout.data + layout.data_rank(rank) == rank
        assert layout.expert_rank(rank) < expert


def test_a_launcher_checks_a_layout_without_importing_torch() -> None:
    code = (
        "import sys\n"
        "from launcher.elastic.layouts import choose_layout\n"
        "from megamoe.config import load_config\n"
        "from megamoe.parallel.layout import plan_layout\n"
        "config = load_config('configs/1b.yaml', ['parallel.pipeline=2', 'parallel.expert=2'])\n"
        "assert plan_layout(config, 8).pipeline == choose_layout(config, 8).pipeline == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_sharding_more_is_predicted_to_need_less_memory() -> None:
    def total(ranks: int, **parallel: Any) -> int:
        config = parse_config(small_config(parallel=parallel), "test")
        return predict_memory(config, plan_layout(config, ranks), 0).total

    assert total(4, zero=3) < total(4, zero=2) < total(4, zero=1) < total(1)
    assert total(4, expert=4) < total(4)
