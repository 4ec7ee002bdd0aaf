"""Log-probabilities of given tokens, with logits computed in chunks over the sequence."""

import functools

import jax
import jax.numpy as jnp

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.transformer import bind, segment_positions
from gptoss_jax.parallel.context import map_sequences
from gptoss_jax.parallel.mesh import current_axes, sequence_shards
from gptoss_jax.training.losses import chunk_length, split_chunks

# Default number of tokens per batch.
BATCH_TOKENS = 1 << 14

Batch = dict[str, jax.Array]


def batch_rows(length: int) -> int:
    """Returns the number of rows of `length` tokens in a default batch."""
    return max(1, BATCH_TOKENS // length)


def split_rows(rows: int) -> int:
    """Rounds rows up to a number that the current mesh can split."""
    shards = sequence_shards(current_axes())
    return -(-rows // shards) * shards


@functools.partial(jax.jit, static_argnames="config")
def token_logprobs(config: ModelConfig, params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns log p(target) in nats, float32 [B, T], and whether the target is the most likely token, bool.

    `batch` holds tokens, targets and segment_ids, int32 [B, T]; results at padding (segment 0) are undefined.
    Positions restart at 0 in each segment. Only one chunk of logits is in memory at a time. Recompiles for a
    new batch shape.
    """
    model = bind(config, params)

    def one_chunk(inputs):
        hidden_BCD, target_BC = inputs
        logits_BCV = model.logits(hidden_BCD)
        chosen_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)[..., 0]
        logprobs_BC = chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
        return logprobs_BC, jax.lax.argmax(logits_BCV, 2, jnp.int32) == target_BC

    def of_rows(batch):
        names = ("tokens", "segment_ids", "positions")
        hidden_BTD, _, _ = model.hidden_states(*(batch[name] for name in names))
        B, T, _ = hidden_BTD.shape
        chunk = chunk_length(B, T, config.vocab_size)
        chunks = jax.lax.map(one_chunk, split_chunks((hidden_BTD, batch["targets"]), chunk))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T), chunks)

    return map_sequences(of_rows, batch | {"positions": segment_positions(batch["segment_ids"])})
