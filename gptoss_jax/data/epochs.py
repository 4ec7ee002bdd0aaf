"""Epochs of a run: how often its steps repeat the training data."""

import numpy as np

from gptoss_jax.config import TrainConfig
from gptoss_jax.data.batches import PackedRows, usable_prompts
from gptoss_jax.data.token_cache import TokenCache

# Fine-tuning data is usually repeated one to three times.
MAX_EPOCHS, SUGGESTED_EPOCHS = 5, 3


def describe_epochs(config: TrainConfig, cache: TokenCache) -> list[str]:
    """Returns a line with the number of epochs and, if conversations are repeated often, a warning."""
    data, steps = config.data, config.steps
    if config.objective == "grpo":
        longest = config.longest_prompt
        prompts = len(usable_prompts(cache, longest, held_out=False))
        left_out = int(np.sum(~cache.held_out)) - prompts
        epochs = rollout_epochs(config, prompts, steps)
        return [
            f"{steps:,} step{'s' * (steps != 1)} = {epochs:.2g} epochs of {prompts:,} prompts"
            + (f"; {left_out:,} with more than {longest:,} tokens are left out" if left_out else "")
        ]
    rows = len(PackedRows(cache, False, data.seq_len, data.overlong))
    epochs = steps * data.batch_size / rows
    count = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"
    lines = [f"{steps:,} step{'s' * (steps != 1)} = {count} epochs of {rows:,} row{'s' * (rows != 1)}"]
    if cache.weights is not None and epochs > MAX_EPOCHS:
        few = max(round(SUGGESTED_EPOCHS * rows / data.batch_size), 1)
        lines.append(
            f"warning: more than {MAX_EPOCHS} epochs usually overfit. Watch the held-out loss, and use fewer "
            f"--steps ({SUGGESTED_EPOCHS} epochs: {few:,}), a smaller --data.batch-size, or more data"
        )
    return lines


def rollout_epochs(config: TrainConfig, prompts: int, steps: int) -> float:
    """Returns how often a run that samples answers uses each of its prompts in so many steps."""
    rollouts = -(-steps // config.grpo.iterations)
    return rollouts * (config.data.batch_size // config.grpo.group_size) / prompts
