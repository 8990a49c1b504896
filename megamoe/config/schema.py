"""The whole :class:`Config`: one section per owner, and the checks that span sections.

Sizes that follow from these settings (parameters, FLOPs) are in :mod:`megamoe.model.size`; whether a layout can run at
all is in :mod:`megamoe.parallel.layout`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from megamoe.config.data import DataConfig
from megamoe.config.launch import LaunchConfig
from megamoe.config.model import ModelConfig
from megamoe.config.parallel import ParallelConfig
from megamoe.config.section import Count, Section
from megamoe.config.training import CheckpointConfig, MetricsConfig, OptimConfig, TrainConfig


class RunConfig(Section):
    """Identity of the run."""

    name: str = Field("run", min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="Name of the run.")
    dir: Path | None = Field(None, description="Folder of the run. Default: runs/<run.name>.")
    seed: Count = Field(0, description="Seed of the initial weights and of the sample order.")

    @property
    def folder(self) -> Path:
        """Folder that holds everything the run writes."""
        return self.dir if self.dir is not None else Path("runs") / self.name


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _names_of_sources(self) -> Config:
        names = [source.name for source in self.data.train if source.name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"data.train: two sources share a name ({', '.join(names)}); give each a name of its own")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.train.global_batch % self.train.micro_batch:
            raise ValueError(
                f"train.micro_batch {self.train.micro_batch} does not divide train.global_batch {self.train.global_batch}"
            )
        if self.model.vision.patches + 2 > self.data.sequence_length:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} has no room for one picture of "
                f"{self.model.vision.patches} tokens and a caption; raise it or model.vision.patch_size"
            )
        return self
