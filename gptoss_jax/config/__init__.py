"""Every setting of the project, as frozen dataclasses: `ModelConfig`, and `TrainConfig` with its parts.

Each class checks its fields on creation: a bad value is a `ValueError` with the field, the value and what is
allowed. Nothing here imports jax.
"""

from gptoss_jax.config.base import require
from gptoss_jax.config.model import FULL, SLIDING, LoraConfig, ModelConfig, RopeScaling
from gptoss_jax.config.train import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
)

__all__ = [
    "FULL",
    "SLIDING",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "RopeScaling",
    "TrainConfig",
    "require",
]
