"""gpt-oss in JAX and Flax. These are the public names; each is imported when it is first used."""

from etils import epy

from gptoss_jax.version import __version__

with epy.lazy_api_imports(globals()):
    from gptoss_jax.checkpoints.export import save_pretrained
    from gptoss_jax.checkpoints.load import from_pretrained
    from gptoss_jax.config import ModelConfig, TrainConfig
    from gptoss_jax.data.tokenizer import load_tokenizer
    from gptoss_jax.inference.engine import Engine
    from gptoss_jax.inference.generate import generate, stream
    from gptoss_jax.inference.sampling_params import Completion, SamplingParams
    from gptoss_jax.model.intermediates import capture_intermediates
    from gptoss_jax.model.transformer import Transformer
    from gptoss_jax.planning.diagram import draw_architecture
    from gptoss_jax.training.loop import train

__all__ = [
    "Completion",
    "Engine",
    "ModelConfig",
    "SamplingParams",
    "TrainConfig",
    "Transformer",
    "__version__",
    "capture_intermediates",
    "draw_architecture",
    "from_pretrained",
    "generate",
    "load_tokenizer",
    "save_pretrained",
    "stream",
    "train",
]
