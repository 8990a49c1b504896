"""Settings of the training loop: steps and faults, optimizer, checkpoints, metrics."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megamoe.config.section import Count, NonNegative, Positive, PositiveInt, Section


class TrainConfig(Section):
    """Length, batch and number format of the run, and the limits of what it tolerates."""

    steps: PositiveInt = Field(1000, description="Optimizer steps.")
    global_batch: PositiveInt = Field(64, description="Packed sequences per optimizer step, over all ranks.")
    micro_batch: PositiveInt = Field(1, description="Packed sequences per forward pass of a rank.")
    check_every: Count = Field(
        100,
        description="Steps between comparisons of what must be equal on several ranks: weights (bit by bit), counters, "
        "random generators, position in the data. They are also compared before each checkpoint. 0: never; then ranks do "
        "not watch their main parameters and moments either.",
    )
    max_skipped: Count = Field(
        3,
        description="Maximum consecutive steps that are skipped because their loss or gradient is NaN or Inf, also when "
        "computed a second time; at one more the run stops.",
    )
    # The demo, which is healthy, never exceeds 6.4 over 64 updates. Real spikes lie far beyond the threshold.
    spike_threshold: NonNegative = Field(
        20.0,
        description="A step is a spike, and is not applied, if its loss or gradient norm exceeds the median of the last "
        "updates by more than this many times their spread (1.48 x median absolute deviation; at least 5% of the median "
        "for the loss and 20% for the norm). 0: never.",
    )
    spike_window: Annotated[int, Field(ge=8)] = Field(
        64, description="Updates that a step is compared with. Until this many were made, nothing counts as a spike."
    )
    max_spikes: Count = Field(
        3,
        description="Maximum consecutive spikes that are skipped; at one more the run rolls back to a checkpoint from "
        "before them and continues past them.",
    )
    spike_margin: Count = Field(
        8,
        description="Steps before the first of these spikes that are not applied after the rollback either: their updates "
        "led to the spikes.",
    )
    max_rollbacks: Count = Field(
        2,
        description="Maximum rollbacks without a new checkpoint past the spikes; after that the run stops.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="Number format of weights and activations. bf16 keeps fp32 main parameters."
    )
    # Longer than the six attempts that a stuck shard gets (6.5 minutes). Shorter than the timeout of collectives (10),
    # which would end the waiting ranks without naming the one that hangs.
    watchdog_seconds: NonNegative = Field(
        480.0,
        description="A rank that waits longer than this in one part of a step ends itself and writes the stacks of its "
        "threads to its log. Start-up, first step and saving get ten times as long. 0: never.",
    )


class OptimConfig(Section):
    """Optimizer, schedule and clipping."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="Optimizer.")
    lr: Positive = Field(3e-4, description="Peak learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW: decay of the two moments.")
    eps: Positive = Field(1e-8, description="AdamW: epsilon.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="SGD: momentum.")
    weight_decay: NonNegative = Field(0.1, description="Decoupled weight decay of matrices; norms and biases have none.")
    clip: NonNegative = Field(1.0, description="Maximum global gradient norm; 0: no clipping.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="After warm-up: cosine, warmup-stable-decay (arXiv:2404.06395), or constant."
    )
    warmup: Count = Field(100, description="Steps of linear warm-up.")
    decay: Count = Field(0, description="wsd: steps of linear decay at the end; 0: a tenth of the run.")
    min_lr: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="Final rate as a fraction of the peak.")

    @model_validator(mode="after")
    def _betas(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must lie in [0, 1)")
        return self


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every: PositiveInt = Field(500, description="Steps between checkpoints; the last step is always saved.")
    keep: PositiveInt = Field(
        3,
        description="Checkpoints to keep. Older ones are deleted once a new one is complete, and when a run resumes.",
    )
    keep_every: Count = Field(
        0, description="Keep checkpoints permanently whose step is a multiple of this; 0: keep none permanently."
    )
    # Off needs no memory beyond that of training. On saves only seconds per save and costs nothing more after a fault.
    in_background: bool = Field(
        False,
        alias="async",
        description="Continue training while a checkpoint is written from a copy in host memory (AdamW: 12 bytes for each "
        "parameter that the rank owns). The run waits for the last checkpoint and for the one before a stop.",
    )
    # wait writes every checkpoint that is due; skip never delays training.
    when_busy: Literal["wait", "skip"] = Field(
        "wait",
        description="With checkpoint.async, what to do when the previous checkpoint is still being written. wait: finish "
        "it first; skip: do not write the new one.",
    )
    mirror: str | None = Field(
        None,
        description="Folder in an object store (s3://bucket/runs/one, or any other URL that fsspec can write) to which "
        "each checkpoint is copied while training continues. --resume auto fetches from it what the run's folder has lost.",
    )


class MetricsConfig(Section):
    """What is written for people to look at. metrics.jsonl records every step in any case."""

    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    tensorboard_every: PositiveInt = Field(10, description="Steps between scalars and expert loads in TensorBoard.")
    images_every: Count = Field(200, description="Steps between training pictures in TensorBoard; 0: none.")
