"""The settings of a run, typed and validated: one file per owner, loaded from YAML and ``KEY=VALUE`` overrides."""

from megamoe.config.data import DataConfig
from megamoe.config.load import dump_config, known_keys, load_config, parse_config
from megamoe.config.model import DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from megamoe.config.parallel import ParallelConfig
from megamoe.config.schema import Config
from megamoe.config.training import OptimConfig

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
