"""The same quantities as in reference.py computed by this package, under the published names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoints.mappings import HUGGINGFACE, parameter_layers
from gptoss_jax.config import ModelConfig
from gptoss_jax.model.parameters import parameter_name
from gptoss_jax.model.transformer import Transformer, bind, get_params


@functools.cache
def _forward(config: ModelConfig):
    return jax.jit(lambda params, tokens_BT: bind(config, params)(tokens_BT))


@functools.cache
def _loss_and_gradients(config: ModelConfig):
    def loss(params, tokens_BT, positions_BT):
        logits_BTV = bind(config, params)(tokens_BT, positions_BT=positions_BT)
        log_probs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], axis=-1))

    return jax.jit(jax.value_and_grad(loss))


def logits(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    """Returns float32 logits [T, V] of one sequence [T]."""
    tokens_BT = jnp.asarray(tokens, jnp.int32)[None]
    return np.asarray(_forward(model.config)(get_params(model), tokens_BT))[0]


def loss_and_gradients(
    model: Transformer, tokens: np.ndarray, positions: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the mean cross-entropy of the next tokens of [B, T], and its gradients by published name."""
    config = model.config
    arrays = (jnp.asarray(array, jnp.int32) for array in (tokens, positions))
    loss, gradients = _loss_and_gradients(config)(get_params(model), *arrays)
    published = {}
    for path, layers in parameter_layers(config).items():
        leaf = gradients
        for name in path:
            leaf = leaf[name]
        mapping = HUGGINGFACE[parameter_name(path)]
        for row, layer in enumerate(layers):
            array = np.asarray(leaf if layer < 0 else leaf[row])
            published[mapping.name(layer)] = mapping.to_file(array)
    return float(loss), published
