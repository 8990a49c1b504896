"""The whole run as typed, validated settings."""

from megamoe.config.load import dump_config, known_keys, load_config, parse_config
from megamoe.config.schema import (
    Config,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    VisionConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "DecoderConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "VisionConfig",
    "dump_config",
    "known_keys",
    "load_config",
    "parse_config",
]
