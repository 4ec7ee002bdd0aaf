"""gpt-oss in JAX and Flax. The names below are the public interface; each is loaded when it is first used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss_jax.checkpoints.export import save_pretrained
    from gptoss_jax.checkpoints.load import from_pretrained
    from gptoss_jax.config import ModelConfig, TrainConfig
    from gptoss_jax.inference.generate import generate
    from gptoss_jax.model.transformer import Transformer
    from gptoss_jax.training.loop import train

_HOMES = {
    "ModelConfig": "gptoss_jax.config",
    "TrainConfig": "gptoss_jax.config",
    "Transformer": "gptoss_jax.model.transformer",
    "from_pretrained": "gptoss_jax.checkpoints.load",
    "generate": "gptoss_jax.inference.generate",
    "save_pretrained": "gptoss_jax.checkpoints.export",
    "train": "gptoss_jax.training.loop",
}
__all__ = [
    "ModelConfig",
    "TrainConfig",
    "Transformer",
    "from_pretrained",
    "generate",
    "save_pretrained",
    "train",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'gptoss_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
