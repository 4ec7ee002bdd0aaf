"""Rows of prompts with sampled answers."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gptoss_jax.data.batches import ADVANTAGES, SAMPLED_LOG_PROBS, zeros
from gptoss_jax.data.packing import pack
from gptoss_jax.data.token_cache import TokenCache
from gptoss_jax.inference.prefill import next_power_of_two


@dataclasses.dataclass(frozen=True)
class Sample:
    """An answer to a prompt, with its stop token if it has one. Its advantage is None if it is left out,
    because a reward of its group cannot be used."""

    document: int  # the prompt, in the cache
    tokens: list[int]
    log_probs: list[float]  # with which each token was sampled
    advantage: float | None = None


def prompt_of(cache: TokenCache, document: int) -> list[int]:
    """Returns the tokens of a prompt."""
    start, end = cache.offsets[document : document + 2]
    return cache.tokens[start:end].tolist()


def make_rows(cache: TokenCache, samples: Sequence[Sample], seq_len: int, unit: int) -> dict[str, np.ndarray]:
    """Packs prompts with their answers into rows, arrays [R, T]: those of `data.batches.BATCH_FIELDS`, and
    the log-probability and the advantage of each sampled token. Answers without an advantage are left out.

    R is `unit` times 1, 2, 3, 4, 6, 8, 12 and so on, so that few programs are compiled, but at most one row
    per answer.
    """
    used = [one for one in samples if one.advantage is not None]
    wholes = [prompt_of(cache, one.document) + one.tokens for one in used]
    plan = pack(np.array([len(whole) - 1 for whole in wholes]), seq_len)
    needed = len(plan.row_offsets) - 1
    units = min(_rounded_up(max(-(-needed // unit), 1)), -(-len(samples) // unit))
    rows = zeros((units * unit, seq_len), (SAMPLED_LOG_PROBS, ADVANTAGES))
    for row in range(needed):
        start = 0
        for segment, piece in enumerate(range(*plan.row_offsets[row : row + 2]), start=1):
            one, whole = used[plan.document[piece]], wholes[plan.document[piece]]
            end, answer = start + len(whole) - 1, start + len(whole) - 1 - len(one.tokens)
            rows["tokens"][row, start:end], rows["targets"][row, start:end] = whole[:-1], whole[1:]
            rows["segment_ids"][row, start:end] = segment
            rows["positions"][row, start:end] = np.arange(end - start)
            rows["loss_weights"][row, answer:end] = 1
            rows[SAMPLED_LOG_PROBS][row, answer:end] = one.log_probs
            rows[ADVANTAGES][row, answer:end] = one.advantage
            start = end
    return rows


def _rounded_up(count: int) -> int:
    """Returns the smallest of 1, 2, 3, 4, 6, 8, 12, 16 and so on that is at least `count`."""
    power = next_power_of_two(count)
    return 3 * power // 4 if 4 * count <= 3 * power else power
