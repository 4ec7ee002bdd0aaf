"""What a model says of tokens that are given: the log-probability of each, in chunks over the sequence."""

import functools

import jax
import jax.numpy as jnp

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.transformer import bind
from gptoss_jax.training.losses import chunk_length

# Tokens of a batch where nobody asks for another size.
BATCH_TOKENS = 1 << 14

Batch = dict[str, jax.Array]


def batch_rows(length: int) -> int:
    """Rows of so many tokens that make a batch of the usual size."""
    return max(1, BATCH_TOKENS // length)


@functools.partial(jax.jit, static_argnames="config")
def token_logprobs(config: ModelConfig, params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """log p(target) in nats, float32 [B, T], and whether the target is the likeliest token, bool [B, T].

    `batch` holds int32 [B, T]: tokens, targets and segment_ids (0 is padding, whose scores mean nothing);
    positions start from 0 in each segment. The logits of all positions never exist together. Compiles for
    each shape of a batch.
    """
    model = bind(config, params)
    hidden_BTD, _, _ = model.hidden_states(batch["tokens"], batch["segment_ids"])
    B, T, _ = hidden_BTD.shape
    chunk = chunk_length(B, T, config.vocab_size)

    def split(x):
        return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0)

    def one_chunk(inputs):
        x_BCD, target_BC = inputs
        logits_BCV = model.logits(x_BCD)
        chosen_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)[..., 0]
        log_probs_BC = chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
        return log_probs_BC, jax.lax.argmax(logits_BCV, 2, jnp.int32) == target_BC

    found = jax.lax.map(one_chunk, (split(hidden_BTD), split(batch["targets"])))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T), found)
