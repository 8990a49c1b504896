"""What a checkpoint says besides tensors: counters, position in the data, config, and what a run must share to resume."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megamoe import __version__
from megamoe.config import Config, parse_config
from megamoe.core.errors import CheckpointError
from megamoe.metrics.counters import Counters

_OPTIONAL = {"versions", "spike_watch"}  # checkpoints of the first versions lack them
_REQUIRED = {"position", "config", "tokenizer", "data"}


@dataclass(frozen=True)
class TrainState:
    """State of a run after a step.

    Attributes:
        counters: What has been counted up to this step.
        position: Where the run is in its data: :meth:`megamoe.data.order.position.DataState.to_json`.
        config: The resolved config, as a tree.
        tokenizer: Fingerprint of the tokenizer.
        data: Fingerprint of the training shards.
        versions: Versions of the packages that wrote the checkpoint.
        guard: What later steps are judged by: :meth:`megamoe.train.guard.Guard.to_json`.
    """

    counters: Counters
    position: dict[str, Any]
    config: dict[str, Any]
    tokenizer: str
    data: str
    versions: dict[str, str] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Steps done, including the skipped ones."""
        return self.counters.step

    def to_json(self) -> dict[str, Any]:
        """Return the tree for the manifest. The counters stand beside the other keys, as in all versions before."""
        return {
            **self.counters.to_json(),
            "position": self.position,
            "config": self.config,
            "tokenizer": self.tokenizer,
            "data": self.data,
            "versions": self.versions,
            "spike_watch": self.guard,
        }

    @classmethod
    def from_json(cls, tree: object, source: str) -> TrainState:
        """Restore the state from the tree of a manifest.

        Raises:
            CheckpointError: a field is missing, unknown or malformed.
        """
        try:
            return cls._parse(tree)
        except TypeError as error:
            raise CheckpointError(f"checkpoint {source}: its state is malformed ({error})") from None

    @classmethod
    def _parse(cls, tree: object) -> TrainState:
        if not isinstance(tree, Mapping):
            raise TypeError("not an object")
        counters = Counters.from_json(tree)
        rest = {key: value for key, value in tree.items() if key not in counters.to_json()}
        if missing := _REQUIRED - rest.keys():
            raise TypeError(f"missing {', '.join(sorted(missing))}")
        if unknown := rest.keys() - _REQUIRED - _OPTIONAL:
            raise TypeError(f"unknown {', '.join(sorted(unknown))}")
        return cls(counters, guard=rest.pop("spike_watch", {}), **rest)

    def parsed_config(self, source: str) -> Config:
        """Parse the config that the checkpoint was written under."""
        return parse_config(self.config, source=f"of checkpoint {source}")


def package_versions() -> dict[str, str]:
    """Return the versions that a checkpoint names as its writers."""
    return {"megamoe": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}}


def check_fits(state: TrainState, config: Config, tokenizer: str, data: str, source: str) -> None:
    """Check that a run may resume from ``state``.

    Layout, workers, number of steps and records may change. Whatever the sequence of losses depends on may not.

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
            f"the order of samples would not continue; start a new run"
        )


def _differences(before: Any, now: Any, key: str) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for name in sorted(before.keys() | now.keys()):
            found += _differences(before.get(name), now.get(name), f"{key}.{name}")
        return found
    return [] if before == now else [(key, before, now)]
