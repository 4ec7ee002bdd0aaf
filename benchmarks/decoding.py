"""Shared by the decoding benchmarks: bytes that a step reads, experts that it uses, and timing."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import SLIDING, ModelConfig
from gptoss_jax.hardware import parameter_counts
from gptoss_jax.model.kv_cache import init_cache
from gptoss_jax.model.transformer import bind, compute_dtype

# Bytes of an MXFP4 weight: half a byte for its code, and its share of the scale of 32 weights.
MXFP4_BYTES = 1 / 2 + 1 / 32


def step_bytes(config: ModelConfig, batch: int, context: int, experts: float, itemsize: int = 4) -> float:
    """Returns the bytes that one decoding step must read: weights, and visible keys and values.

    Embedding rows, activations and anything written are not counted.

    Args:
      batch: sequences, which share the weights.
      context: tokens that a full layer sees, including the newest.
      experts: distinct experts of a layer that the tokens of a step are routed to.
      itemsize: bytes of an element of the cache and of all weights but MXFP4 ones.
    """
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    matrices, biases = 3 * D * F, config.expert_bias * (2 * F + D)
    outside = parameter_counts(config)[1] - L * config.num_experts_per_tok * (matrices + biases)
    expert = matrices * (MXFP4_BYTES if config.expert_format == "mxfp4" else itemsize) + biases * itemsize
    window = min(context, config.sliding_window + config.sink_tokens)
    slots = sum(window if kind == SLIDING else context for kind in config.resolved_layer_types)
    cache = batch * slots * 2 * config.num_key_value_heads * config.head_dim
    return L * experts * expert + (outside + cache) * itemsize


def mean_step_bytes(
    config: ModelConfig, batch: int, prompt: int, new: int, experts: float, itemsize: int = 4
) -> float:
    """Returns the mean of `step_bytes` over the steps of `new` tokens, without the first token."""
    contexts = range(prompt + 1, prompt + new)
    return statistics.mean(step_bytes(config, batch, context, experts, itemsize) for context in contexts)


def expected_experts(config: ModelConfig, batch: int) -> float:
    """Returns the expected distinct experts per layer for `batch` tokens, if all are equally likely."""
    E, X = config.num_local_experts, config.num_experts_per_tok
    return E * (1 - (1 - X / E) ** batch)


def measured_experts(config: ModelConfig, params: dict, rows_BT: np.ndarray, prompt: int) -> float:
    """Returns the mean number of distinct experts per layer and step, over the steps after `prompt`.

    Reruns `rows_BT`, prompts with their completions, and counts from the router's statistics.
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


def decode_seconds(short: list[float], long: list[float]) -> list[float]:
    """Returns the seconds of long completions minus those of one token, call by call."""
    # With tiny sizes the difference may be noise.
    return [max(b - a, 1e-9) for a, b in zip(short, long, strict=True)]
