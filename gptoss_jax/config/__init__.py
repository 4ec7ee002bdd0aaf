"""Every setting of the project, as frozen dataclasses: `ModelConfig`, and `TrainConfig` with its parts.

Each class checks itself when it is made: a bad value is a `ValueError` that names the field, the value and
what is allowed. `checked.py` does that, `model.py` is the architecture, `train.py` a training run, and
`published.py` and `published_write.py` read and write the config.json files that gpt-oss models are published
with. No file here imports jax.
"""

from gptoss_jax.config.base import require
from gptoss_jax.config.model import FULL, SLIDING, ModelConfig, RopeScaling
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
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "RopeScaling",
    "TrainConfig",
    "require",
]
