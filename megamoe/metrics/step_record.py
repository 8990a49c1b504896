"""The schema of a line of RUN/metrics.jsonl, which TensorBoard, the progress line, the report and the launcher share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Required, TypedDict, cast, get_type_hints

Number = int | float | None
"""A measured value. A reader gets None for NaN and infinities, which JSON cannot express."""


class StepRecord(TypedDict, total=False):
    """The record of one optimizer step, in the order in which it is written.

    A training run writes every key. A reader may rely on ``step`` only: an older version wrote fewer keys.

    Attributes:
        step: Steps done, including the skipped ones.
        loss: Mean over the global batch: language model plus router losses.
        lm_loss: Cross entropy of the caption tokens.
        aux_loss: Load-balancing loss, weighted.
        z_loss: Router z-loss, weighted.
        grad_norm: Global norm of the gradient before clipping.
        lr: Learning rate.
        tokens: Tokens trained on since the start of the run, without padding.
        samples: Image-text pairs trained on since the start of the run.
        lost: Samples that could not be used since the start of the run.
        bad_shards: Shards in quarantine.
        truncated: Captions cut to the sequence length in this step.
        recomputed: Steps computed a second time since the start of the run.
        skipped: Steps without an update since the start of the run: loss or gradient norm was not finite, twice.
        spikes: Steps without an update since the start of the run: loss spikes, and steps skipped after a rollback.
        rolled_back: Rollbacks since the start of the run.
        step_seconds: Duration of the step.
        data_seconds: Time for which this rank waited for its part of the data.
        tokens_per_second: Tokens of this step, over all ranks, per second.
        model_flops_per_second: FLOPs of the model's forward and backward pass, over all ranks, per second.
        world_size: Ranks.
        load: Sparse layer -> share of its routed tokens that each expert got (a list of E numbers).
        sources: Data source -> what this step took from it, over all ranks: ``samples bytes decode_seconds lost_image
            lost_caption lost_incomplete lost_shard``.
        reading: What reading cost in this step, over all ranks: ``downloads cache_hits retries received seconds``
            (bytes and seconds of the workers).
    """

    step: Required[int]
    loss: Number
    lm_loss: Number
    aux_loss: Number
    z_loss: Number
    grad_norm: Number
    lr: Number
    tokens: int
    samples: int
    lost: int
    bad_shards: int
    truncated: int
    recomputed: int
    skipped: int
    spikes: int
    rolled_back: int
    step_seconds: Number
    data_seconds: Number
    tokens_per_second: Number
    model_flops_per_second: Number
    world_size: int
    load: Mapping[str, Sequence[Number]]
    sources: Mapping[str, Mapping[str, Number]]
    reading: Mapping[str, Number]


def parse_record(tree: object) -> StepRecord:
    """Check the types of a decoded line. Keys that this version does not know pass.

    Raises:
        TypeError: a value has another type than the schema says; names the key.
    """
    if not isinstance(tree, dict) or "step" not in tree:
        raise TypeError("no object with a step")
    for key in tree.keys() & _CHECKS.keys():
        if not _CHECKS[key](tree[key]):
            raise TypeError(f"{key} has another type than a record has")
    return cast(StepRecord, tree)


def _is_count(value: object) -> bool:
    return type(value) is int


def _is_number(value: object) -> bool:
    return type(value) in _NUMBERS


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and _NUMBERS.issuperset(map(type, value.values()))


def _is_load(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(row, list) and _NUMBERS.issuperset(map(type, row)) for row in value.values()
    )


def _are_sources(value: object) -> bool:
    return isinstance(value, dict) and all(map(_are_numbers, value.values()))


_NUMBERS = frozenset((int, float, type(None)))
_CHECK_OF_TYPE: Mapping[object, Callable[[object], bool]] = {
    int: _is_count,
    Number: _is_number,
    Mapping[str, Sequence[Number]]: _is_load,
    Mapping[str, Mapping[str, Number]]: _are_sources,
    Mapping[str, Number]: _are_numbers,
}
_CHECKS = {key: _CHECK_OF_TYPE[hint] for key, hint in get_type_hints(StepRecord).items()}
