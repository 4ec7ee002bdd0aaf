"""Quantization-aware training: the model that export will write, as a function of the trained parameters.

With `model.expert_fake_quant`, `transformer.bind` runs the model of `gptoss convert --experts mxfp4`, or of
`gptoss merge --experts mxfp4`: adapters are merged, the experts' matrices are rounded to MXFP4, and all
other parameters to bfloat16. The optimizer updates float32 parameters; gradients pass the rounding unchanged
(the straight-through estimator, Bengio et al. 2013).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gptoss_jax.config import ModelConfig
from gptoss_jax.config.model import EXPERT_TARGETS
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.model import lora
from gptoss_jax.model.parameters import LETTERS, parameter_name

HIGHEST = jax.lax.Precision.HIGHEST


def exported_config(config: ModelConfig) -> ModelConfig:
    """Returns the config of `exported_params`: without adapters, and with experts that were adapted dense.
    Without `expert_fake_quant`, returns `config`."""
    if not config.expert_fake_quant:
        return config
    is_packed = config.expert_format == "mxfp4" and not _adapts_experts(config)
    return dataclasses.replace(
        config, expert_fake_quant=False, lora=None, expert_format="mxfp4" if is_packed else "plain"
    )


def exported_params(config: ModelConfig, params: dict) -> dict:
    """Returns the parameters that export would write, as float32 arrays of the same values; packed experts
    without adapters stay packed. Without `expert_fake_quant`, returns `params`.

    Args:
      params: the parameters of a model with this config; layers may be stacked.
    """
    return _rounded(config, params) if config.expert_fake_quant else params


@functools.partial(jax.jit, static_argnums=0)
def _rounded(config: ModelConfig, params: dict) -> dict:
    flat, result = flatten_dict(params), {}
    for path, value in flat.items():
        if lora.is_adapter(path) or _is_expert_matrix(path):
            continue
        *module, name = path
        # The head's adapter is `lora_a` and `lora_b`, next to `weight`.
        prefix = "" if name == "weight" else f"{name}_"
        factors = [flat.get((*module, f"{prefix}{suffix}")) for suffix in lora.SUFFIXES]
        result[path] = _round_to_bfloat16(_merged(config, parameter_name(path), value, factors))
    for path in [path for path in flat if path[-2:] == ("moe", "router")]:
        module = path[:-1]
        inside = {key[-1]: value for key, value in flat.items() if key[:-1] == module}
        result |= {(*module, name): value for name, value in _exported_experts(config, inside).items()}
    return unflatten_dict(result)


def _adapts_experts(config: ModelConfig) -> bool:
    return config.lora is not None and any(target in EXPERT_TARGETS for target in config.lora.targets)


def _is_expert_matrix(path: tuple[str, ...]) -> bool:
    """Returns True for `gate_up` and `down`, dense or packed, but not for their biases."""
    matrix = path[-1].removesuffix("_blocks").removesuffix("_scales")
    return path[-2:-1] == ("moe",) and matrix in EXPERT_TARGETS


def _merged(config: ModelConfig, key: str, weight: jax.Array, factors: list[jax.Array | None]) -> jax.Array:
    """Returns a weight plus its delta, float32, in the operations of `gptoss merge`."""
    a, b = factors
    weight = weight.astype(jnp.float32)
    if a is None or b is None:
        return weight
    names = [
        f"{key}_{suffix}" if f"{key}_{suffix}" in LETTERS else f"head.{suffix}" for suffix in lora.SUFFIXES
    ]
    target = key.rpartition(".")[2] if key != "head.weight" else "head"
    equation = f"...{LETTERS[names[0]]},...{LETTERS[names[1]]}->...{LETTERS[key]}"
    delta = jnp.einsum(equation, a, lora.scaling(config, target) * b, precision=HIGHEST)
    return lora.add_delta(weight, delta)


def _exported_experts(config: ModelConfig, moe: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the matrices of the experts of a layer, or of stacked layers; `moe` has all its parameters."""
    is_packed = "down_blocks" in moe
    if is_packed and not _adapts_experts(config):
        return {name: value for name, value in moe.items() if name.endswith(("_blocks", "_scales"))}
    result = {}
    for target in EXPERT_TARGETS:
        delta = None
        if f"{target}_lora_a" in moe:
            a, b = (moe[f"{target}_{suffix}"] for suffix in lora.SUFFIXES)
            b = _packed_rows(target, lora.scaling(config, target) * b)
            delta = jnp.einsum("...ir,...ro->...oi", a, b.swapaxes(-1, -2), precision=HIGHEST)
        if is_packed:
            packed = moe[f"{target}_blocks"], moe[f"{target}_scales"]
            rows = codec.dequantize(*packed, jnp.float32) if delta is None else _add_delta(delta, *packed)
        else:
            rows = _packed_rows(target, moe[target].astype(jnp.float32))
            rows = _round_to_mxfp4(rows if delta is None else rows + delta)
        result[target] = _dense(target, rows)
    return result


def _packed_rows(target: str, weight: jax.Array) -> jax.Array:
    """Returns [..., inputs, (2,) outputs] as [..., rows, inputs]: rows of gate and up alternate."""
    if target == "gate_up":
        *leading, inputs, pair, outputs = weight.shape
        return weight.swapaxes(-3, -1).reshape(*leading, outputs * pair, inputs)
    return weight.swapaxes(-1, -2)


def _dense(target: str, rows: jax.Array) -> jax.Array:
    """Inverts `_packed_rows`."""
    if target == "gate_up":
        *leading, outputs, inputs = rows.shape
        return rows.reshape(*leading, outputs // 2, 2, inputs).swapaxes(-3, -1)
    return rows.swapaxes(-1, -2)


@jax.custom_vjp
def _round_to_bfloat16(values: jax.Array) -> jax.Array:
    # Unlike a conversion and back, this is not simplified away.
    return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)


@jax.custom_vjp
def _round_to_mxfp4(values: jax.Array) -> jax.Array:
    return codec.dequantize(*codec.quantize(values), jnp.float32)


@jax.custom_vjp
def _add_delta(delta: jax.Array, blocks: jax.Array, scales: jax.Array) -> jax.Array:
    return codec.dequantize(*codec.add_delta(blocks, scales, delta), jnp.float32)


_round_to_bfloat16.defvjp(lambda values: (_round_to_bfloat16(values), None), lambda _, g: (g,))
_round_to_mxfp4.defvjp(lambda values: (_round_to_mxfp4(values), None), lambda _, g: (g,))
_add_delta.defvjp(lambda *operands: (_add_delta(*operands), None), lambda _, g: (g, None, None))
