"""Sections of gpu.py: prefill and decoding of the whole model."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from common import alternate, percent, print_table, show, spread
from decoding import decode_seconds, expected_experts, mean_step_bytes
from gpu_model import MODELS, TINY, text
from gpu_run import REPETITIONS, Run

from gptoss_jax.config import ModelConfig
from gptoss_jax.hardware import flops_per_token, parameter_counts
from gptoss_jax.inference.generate import generate
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.parameters import path_names
from gptoss_jax.model.transformer import abstract_params, bind, compute_dtype

RELEASED = ModelConfig(
    num_hidden_layers=24, num_local_experts=32, num_experts_per_tok=4, compute_dtype="bfloat16"
)
TINY_PACKED = dataclasses.replace(TINY, hidden_size=64, intermediate_size=32)
# Memory for the cache, activations, and the experts of a dequantized layer, besides the parameters.
RESERVED = 8 << 30
COLUMNS = ("model", "batch", "prefill", "of matmul peak", "decode", "limit by bandwidth", "of the limit")


def generation(run: Run) -> dict:
    """Measures greedy generation for prompts of text, with random bfloat16 weights. Prefill: the time of one
    new token; decoding: the additional time of more. The limit of decoding is the measured bandwidth over
    `decoding.step_bytes`, with all experts equally likely."""
    return _sections(run, {"tiny": TINY} if run.smoke else {"3B": MODELS["3B"]})


def released(run: Run) -> dict:
    """Measures the same with the sizes of gpt-oss-20b, in bfloat16 and with MXFP4 experts."""
    config, name = (TINY_PACKED, "tiny") if run.smoke else (RELEASED, "20b")
    packed = dataclasses.replace(config, expert_format="mxfp4")
    return _sections(run, {f"{name}, packed": packed, name: config})


def _sections(run: Run, models: dict[str, ModelConfig]) -> dict:
    prompt, new = (17, 8) if run.smoke else (1025, 129)
    record = {"prompt": prompt, "new_tokens": new, "models": {}, "rows": []}
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    for name, config in models.items():
        record["models"][name] = config.to_dict()
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_abstract(config)))
        if needed + RESERVED > limit:
            run.skip(f"generation {name}", f"{needed / 1e9:.1f} GB of parameters in {limit / 1e9:.1f} GB")
            continue
        run.attempt(f"generation {name}", _generate, run, name, config, prompt, new, record["rows"])
        # Frees its programs: the next model may need their memory.
        jax.clear_caches()
    print_table(
        f"Generation, tokens/s, prompts of {prompt} tokens, {new} new ones",
        COLUMNS,
        [
            (
                row["model"],
                row["batch"],
                show(row["prefill"], 0),
                percent(row["prefill_of_matmul_peak"]),
                show(row["decode"], 1),
                f"{row['decode_limit']:,.0f}",
                percent(row["decode_of_limit"]),
            )
            for row in record["rows"]
        ],
    )
    return record


def _abstract(config: ModelConfig) -> dict:
    """Returns the abstract parameters in the compute type; MXFP4 ones stay uint8."""
    dtype = compute_dtype(config)

    def typed(leaf):
        return leaf if leaf.dtype == jnp.uint8 else jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree.map(typed, abstract_params(config))


def random_parameters(config: ModelConfig) -> dict:
    """Returns random parameters, created layer by layer in their final type, never in float32."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def layers(key, shape, dtype):
        def one(key):
            if dtype == jnp.uint8:
                return jax.random.bits(key, shape[1:], dtype)
            return config.initializer_range * jax.random.normal(key, shape[1:], dtype)

        return jax.lax.map(one, jax.random.split(key, shape[0]))

    def leaf_of(path, leaf, key):
        name = path_names(path)[-1]
        if name.endswith("_scales"):
            # Magnitudes are 3 on average: 2^-7 of that is about `initializer_range`.
            return jnp.full(leaf.shape, 127 - 7, leaf.dtype)
        if name == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        if name.endswith("bias") or name == "sinks":
            return jnp.zeros(leaf.shape, leaf.dtype)
        # Embedding and head are created at once.
        shape = leaf.shape if leaf.ndim > 2 else (1, *leaf.shape)
        return layers(key, shape, leaf.dtype).reshape(leaf.shape)

    tree = _abstract(config)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(tree))))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf_of(path, leaf, next(keys)), tree)


def _generate(run: Run, name: str, config: ModelConfig, prompt: int, new: int, rows: list[dict]) -> None:
    model = bind(config, jax.block_until_ready(random_parameters(config)))
    head = 2 * config.hidden_size * config.vocab_size
    prefill_flops = flops_per_token(config, prompt, training=False) - head
    size = compute_dtype(config).itemsize
    for batch in (1, 2) if run.smoke else (1, 8, 32):
        title = f"generation {name}, batch {batch}"
        if run.time_left <= 0:
            run.skip(title, "no time left")
            continue
        prompts = text(batch * prompt).reshape(batch, prompt)
        calls = {
            name: functools.partial(generate, model, prompts, SamplingParams(max_new_tokens=count))
            for name, count in (("short", 1), ("long", new))
        }
        seconds = run.attempt(title, alternate, calls, REPETITIONS)
        if seconds is None:
            continue
        seconds_decode = decode_seconds(seconds["short"], seconds["long"])
        prefill = spread([batch * prompt / s for s in seconds["short"]])
        decode = spread([batch * (new - 1) / s for s in seconds_decode])
        experts = expected_experts(config, batch)
        nbytes = mean_step_bytes(config, batch, prompt, new, experts, size)
        limit = batch * run.bandwidth / nbytes
        rows.append(
            {"model": name, "batch": batch, "parameters": parameter_counts(config)[0], "step_bytes": nbytes}
            | {"prefill": prefill, "prefill_of_matmul_peak": prefill["median"] * prefill_flops / run.peak}
            | {"decode": decode, "decode_limit": limit, "decode_of_limit": decode["median"] / limit}
        )
