"""Settings of the data: shards, their mixture, and how samples become packed sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megamoe.config.section import Count, Positive, PositiveInt, Section


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_sources(value: object) -> object:
    """Wrap bare shards, which are one source."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(each, str) for each in value)):
        return [{"shards": value}]
    return [value] if isinstance(value, dict) else value


Shards = Annotated[list[str], BeforeValidator(_as_list)]


class SourceConfig(Section):
    """Shards that are mixed with others at a given weight."""

    shards: Annotated[Shards, Field(min_length=1)] = Field(description="Shards of this source.")
    weight: Positive = Field(1.0, description="Share of the samples read, relative to the other sources.")
    name: str | None = Field(None, min_length=1, description="Name in the metrics. Default: its number.")


Sources = Annotated[list[SourceConfig], BeforeValidator(_as_sources)]


class DataConfig(Section):
    """Image-text shards and how they become packed sequences."""

    train: Sources = Field(
        [],
        description="Training shards: a folder, a glob, path/{00000..00063}.tar, a::b, http(s)://, s3:// or any other "
        "fsspec URL, or pipe:. Write several sources as a list of {shards: ..., weight: 1.0, name: ...}; weight is the "
        "source's share of the samples read, and each source goes through its own epochs.",
    )
    validation: Shards = Field([], description="Held-out shards, named the same way: what eval reads without --data.")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Share of the training samples that is never trained on, chosen by a hash of the sample keys. eval "
        "reads these samples when data.validation is empty. Re-cutting the shards does not change the choice.",
    )
    tokenizer: Path | None = Field(None, description="sentencepiece model made by `megamoe data tokenizer`.")
    sequence_length: PositiveInt = Field(2048, description="Tokens of a packed sequence, picture tokens included.")
    images_per_sequence: PositiveInt = Field(8, description="Picture slots of a packed sequence.")
    workers: Count = Field(2, description="Decoding processes per loading rank; 0: decode in the training process.")
    prefetch: PositiveInt = Field(2, description="Steps that each worker prepares ahead.")
    shuffle_shards: PositiveInt = Field(
        8,
        description="Shards per shuffling window: samples are shuffled within a window, shards over the whole epoch.",
    )
    index: Path | None = Field(
        None, description="Folder for the indexes of shards that have none beside them. Default: <run.dir>/index."
    )
    cache: Path | None = Field(
        None,
        description="Folder on this node that caches remote shards for all its ranks. Default: $MEGAMOE_CACHE, else "
        "~/.cache/megamoe/shards.",
    )
    cache_gb: Positive = Field(
        100.0, description="Size of the cache in GB (10^9 bytes); least recently used shards are evicted first."
    )
    bad_shards: Literal["stop", "quarantine"] = Field(
        "stop",
        description="What to do when a shard cannot be fetched or read. stop: end the run; quarantine: continue without "
        "the shard, on all ranks alike, and record that in the checkpoint.",
    )
    max_bad_shards: Count = Field(10, description="Stop when more shards than this are in quarantine.")
    max_corrupt: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="Stop when more than this share of the samples read so far was unusable."
    )
    audit: bool = Field(False, description="Write the id of each sample trained on to <run.dir>/audit.")
