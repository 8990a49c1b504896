"""What a checkpoint says besides tensors: progress, position in the data, config, and what it must fit to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megamoe.config import Config, parse_config
from megamoe.core.errors import CheckpointError


@dataclass(frozen=True)
class TrainState:
    """State of a run after ``step`` steps.

    Attributes:
        step: Steps done, those that were skipped included.
        tokens: Tokens of packed sequences trained on, padding left out.
        samples: Image-text pairs trained on.
        lost: Samples that could not be used so far.
        recomputed: Steps that were not finite at first.
        skipped: Steps that were not finite twice, and changed nothing.
        skipped_in_a_row: Those of them that were the last steps.
        position: Where the run is in its data: :meth:`megamoe.data.order.position.DataState.to_json`.
        config: The resolved config, as a tree.
        tokenizer: Fingerprint of the tokenizer.
        data: Fingerprint of the training shards.
        versions: Versions of the packages that wrote the checkpoint.
        lost_shard: Those of ``lost`` whose shard is in quarantine.
        spikes: Steps that changed nothing since their loss was a spike, or since the run went past them.
        spike_watch: What steps are judged by: :meth:`megamoe.train.spikes.SpikeWatch.to_json`.
    """

    step: int
    tokens: int
    samples: int
    lost: int
    recomputed: int
    skipped: int
    skipped_in_a_row: int
    position: dict[str, Any]
    config: dict[str, Any]
    tokenizer: str
    data: str
    versions: dict[str, str] = field(default_factory=dict)
    lost_shard: int = 0
    spikes: int = 0
    spike_watch: dict[str, Any] = field(default_factory=dict)

    @property
    def updates(self) -> int:
        """Optimizer updates made: the steps that were not skipped."""
        return self.step - self.skipped - self.spikes

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: object, source: str) -> TrainState:
        """From a manifest.

        Raises:
            CheckpointError: a field is missing or unknown.
        """
        try:
            return cls(**tree)  # type: ignore[arg-type]
        except TypeError as error:
            raise CheckpointError(f"checkpoint {source}: its state is malformed ({error})") from None

    def parsed_config(self, source: str) -> Config:
        """The config that the checkpoint was written under."""
        return parse_config(self.config, source=f"of checkpoint {source}")


def check_fits(state: TrainState, config: Config, tokenizer: str, data: str, source: str) -> None:
    """Whether a run may go on from ``state``.

    Layout, workers, number of steps and what is written may change; what the sequence of losses depends on may not.

    Raises:
        CheckpointError: it is of another model, tokenizer or data; names the first field that differs.
    """
    was = state.parsed_config(source)
    for section in ("model", "optim"):
        before, now = (getattr(c, section).model_dump(mode="json") for c in (was, config))
        for key, old, new in _differences(before, now, section):
            what = "another model" if section == "model" else "a run with another optimizer setting"
            raise CheckpointError(f"checkpoint {source} is of {what}: {key} is {old} there and {new} here")
    fixed = (
        ("run.seed", was.run.seed, config.run.seed),
        ("train.global_batch", was.train.global_batch, config.train.global_batch),
        ("train.precision", was.train.precision, config.train.precision),
        ("data.sequence_length", was.data.sequence_length, config.data.sequence_length),
        ("data.images_per_sequence", was.data.images_per_sequence, config.data.images_per_sequence),
        ("data.shuffle_shards", was.data.shuffle_shards, config.data.shuffle_shards),
        ("data.held_out", was.data.held_out, config.data.held_out),
    )
    for key, old, new in fixed:
        if old != new:
            raise CheckpointError(f"checkpoint {source}: {key} was {old} and is now {new}; a run cannot change it")
    if state.tokenizer != tokenizer:
        raise CheckpointError(
            f"checkpoint {source} was made with another tokenizer than data.tokenizer {config.data.tokenizer}"
        )
    if state.data != data:
        raise CheckpointError(
            f"checkpoint {source}: the shards of data.train have changed since ({state.data} -> {data}); "
            f"the order of samples would not go on; start a new run"
        )


def _differences(before: Any, now: Any, key: str) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for name in sorted(before.keys() | now.keys()):
            found += _differences(before.get(name), now.get(name), f"{key}.{name}")
        return found
    return [] if before == now else [(key, before, now)]
