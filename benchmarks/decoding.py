"""What the benchmarks of decoding share: what a step reads, what of it the router chose, and the clock."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import SLIDING, ModelConfig
from gptoss_jax.hardware import parameter_counts
from gptoss_jax.model.kv_cache import init_cache
from gptoss_jax.model.transformer import bind, compute_dtype

# Bytes of a packed weight: half of one for its code, and its part of the scale that 32 share.
PACKED = 1 / 2 + 1 / 32


def step_bytes(config: ModelConfig, batch: int, context: int, experts: float, size: int = 4) -> float:
    """Bytes that one step of decoding cannot but read: weights, and the keys and values that are visible.

    All sequences share the weights. `experts`: how many different ones of a layer the tokens of a step go to.
    `context`: tokens that a full layer sees, the newest included. `size`: bytes of a number, in the cache and
    in all weights but packed ones. The embedding's rows, what is written, and activations are not counted.
    """
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    matrices, biases = 3 * D * F, config.expert_bias * (2 * F + D)
    outside = parameter_counts(config)[1] - L * config.num_experts_per_tok * (matrices + biases)
    expert = matrices * (PACKED if config.expert_format == "mxfp4" else size) + biases * size
    near = min(context, config.sliding_window + config.sink_tokens)
    slots = sum(near if kind == SLIDING else context for kind in config.resolved_layer_types)
    cache = batch * slots * 2 * config.num_key_value_heads * config.head_dim
    return L * experts * expert + (outside + cache) * size


def mean_step_bytes(
    config: ModelConfig, batch: int, prompt: int, new: int, experts: float, size: int = 4
) -> float:
    """The mean of `step_bytes` over the steps for all of `new` tokens but the first."""
    contexts = range(prompt + 1, prompt + new)
    return statistics.mean(step_bytes(config, batch, context, experts, size) for context in contexts)


def uniform_experts(config: ModelConfig, batch: int) -> float:
    """How many experts of a layer `batch` tokens go to on average, if each is as likely as any other."""
    E, X = config.num_local_experts, config.num_experts_per_tok
    return E * (1 - (1 - X / E) ** batch)


def chosen_experts(config: ModelConfig, params: dict, rows_BT: np.ndarray, prompt: int) -> float:
    """How many experts of a layer a step goes to, on average over the layers and the steps after `prompt`.

    The rows, prompts with their answers, are read once more, and the router's statistics tell.
    """
    B, T = rows_BT.shape

    @jax.jit
    def count(params, rows_BT):
        model = bind(config, params)

        def step(cache, tokens_B):
            _, cache, stats = model.hidden_states(tokens_B[:, None], cache=cache)
            return cache, jnp.sum(stats["load"] > 0) / len(stats["load"])

        cache = init_cache(config, B, T, compute_dtype(config))
        _, cache, _ = model.hidden_states(rows_BT[:, :prompt], cache=cache)
        _, counts = jax.lax.scan(step, cache, rows_BT[:, prompt:].T)
        return jnp.mean(counts)

    return float(count(params, jnp.asarray(rows_BT, jnp.int32)))


def longer(short: list[float], long: list[float]) -> list[float]:
    """Seconds that long answers take more than those of one token, call by call."""
    # On a machine where nothing takes long the difference may be noise.
    return [max(b - a, 1e-9) for a, b in zip(short, long, strict=True)]
