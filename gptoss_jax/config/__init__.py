"""Frozen dataclasses for every setting of the project: `ModelConfig`, and `TrainConfig` with its sections.

Fields are validated on creation: a bad value raises a `ValueError` that names the field, the value and what
is allowed. Nothing here imports jax.
"""

from gptoss_jax.config.base import require
from gptoss_jax.config.model import FULL, SLIDING, LoraConfig, ModelConfig, RopeScaling
from gptoss_jax.config.preference import DpoConfig
from gptoss_jax.config.rl import GrpoConfig
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
    "DpoConfig",
    "EvalConfig",
    "GrpoConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "RopeScaling",
    "TrainConfig",
    "require",
]
