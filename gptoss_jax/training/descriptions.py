"""Descriptions of a run for its console output."""

import pathlib
import shlex

import jax

from gptoss_jax.config import ModelConfig, TrainConfig
from gptoss_jax.model.lora import adapter_counts
from gptoss_jax.model.parameters import parameter_name
from gptoss_jax.terminal import format_count


def describe_adapters(config: ModelConfig, params: dict) -> str:
    """Describes the number of trained parameters, in total and per target, and the format of the experts; ""
    without adapters."""
    counts = adapter_counts(config)
    each = ", ".join(f"{target} {format_count(count)}" for target, count in counts.items())
    if not counts:
        return ""
    paths = jax.tree_util.tree_leaves_with_path(params)
    dtype = next((leaf.dtype for path, leaf in paths if parameter_name(path) == "moe.gate_up"), None)
    experts = "packed in MXFP4" if dtype is None else f"unpacked, in {dtype}"
    return f"{format_count(sum(counts.values()))} parameters are trained: {each}; experts {experts}"


def next_command(run_dir: pathlib.Path, prompt: str | None) -> str:
    """Returns the shell command, quoted for POSIX, that continues a prompt with a run's model or, if there is
    no prompt, chats with it."""
    # A leading dash would turn either into an option.
    folder = f"./{run_dir}" if str(run_dir).startswith("-") else str(run_dir)
    if prompt is None:
        return f"gptoss chat {shlex.quote(folder)}"
    separator = "=" if prompt.startswith("-") else " "
    return f"gptoss generate {shlex.quote(folder)} --prompt{separator}{shlex.quote(prompt)}"


def describe_step(config: TrainConfig) -> str:
    """Returns what a step processes, for people."""
    data, grpo = config.data, config.grpo
    if config.objective != "grpo":
        return f"{data.batch_size} rows × {data.seq_len} tokens"
    prompts = data.batch_size // grpo.group_size
    answers = f"{grpo.group_size} answers of up to {grpo.max_new_tokens} tokens"
    return f"{prompts} prompt{'s' * (prompts != 1)} × {answers}"
