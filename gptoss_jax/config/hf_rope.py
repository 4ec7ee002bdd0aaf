"""Reads rotary embedding's settings in a published config.json of transformers 4.55 or 5."""

import math
from typing import Any

from gptoss_jax.config.base import agreed, list_unknown, missing, number, require

ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
YARN = (
    "factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings", "attention_factor",
    "mscale", "mscale_all_dim",
)  # fmt: skip


def read_rope(values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Returns `rope_theta` and `rope_scaling` of a Hugging Face file, from wherever it has them."""
    given = {name: values[name] for name in ("rope_scaling", "rope_parameters") if name in values}
    for name, rope in given.items():
        require(rope is None or isinstance(rope, dict), name, rope, "must be an object or null")
    said = {name: rope for name, rope in given.items() if rope}
    if not said:
        # transformers 4.55 and 5 have different defaults.
        if not given:
            raise missing("rope_parameters", (), "a config.json of gpt-oss has it, or rope_scaling")
        # transformers 4.55 writes null for this; to transformers 5 it is the same as a missing field.
        notes.append(f"{next(iter(given))} is null or empty: plain rotary embedding is used, without YaRN")
        said = {next(iter(given)): {}}
    # Both versions of transformers take rope_scaling where both are there.
    name, rope = next(iter(said.items()))
    other = said.get("rope_parameters", rope)
    notes += [
        f"rope_parameters.{key} is {other[key]!r}, but {name}.{key} is {rope[key]!r}: {rope[key]!r} is used"
        for key in sorted(rope.keys() & other.keys())
        if rope[key] != other[key]
    ]
    scaling = _read_scaling(name, rope, values, notes)
    # transformers 4 takes a null for plain rotary embedding, whatever rope_parameters says.
    contradicted = name == "rope_parameters" and "rope_scaling" in given and scaling is not None
    require(not contradicted, "rope_scaling", given.get("rope_scaling"), "must agree with rope_parameters")
    thetas = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") is not None else {}
    if rope.get("rope_theta") is not None:
        thetas[f"{name}.rope_theta"] = rope["rope_theta"]
    if not thetas:
        thetas["rope_theta"] = 150000.0
        notes.append("rope_theta is missing: 150000.0 is used")
    theta = agreed(thetas)
    if other.get("rope_theta") not in (None, theta) and "rope_theta" not in rope:
        notes.append(f"rope_parameters.rope_theta is {other['rope_theta']!r}: {theta!r} is used, rope_theta")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _read_scaling(
    name: str, rope: dict[str, Any], values: dict[str, Any], notes: list[str]
) -> dict[str, Any] | None:
    """Returns the fields of `RopeScaling` from the object `rope` in the field `name`; None for plain rope."""
    unknown = list_unknown(rope, (*ROPE, *YARN), f"{name}.")
    if unknown:
        notes.append(f"unknown fields are ignored: {unknown}")
    for place, said in ((name + ".", rope), ("", values)):
        share = said.get("partial_rotary_factor")
        require(share in (None, 1), f"{place}partial_rotary_factor", share, "must be 1")
    # "type" is the older spelling.
    kinds = {f"{name}.{key}": rope[key] for key in ("rope_type", "type") if key in rope}
    unused = [f"{name}.{key}" for key in YARN if key in rope]
    if not kinds and (unused or unknown):
        raise missing(f"{name}.rope_type", (), "must be 'yarn', or 'default' for plain rotary embedding")
    kind = agreed(kinds) if kinds else "default"
    if kind == "dynamic":
        # It stretches the theta only for texts longer than this.
        notes.append(
            f"{next(iter(kinds))} is 'dynamic': plain rotary embedding is used, which it equals up to "
            f"max_position_embeddings ({values['max_position_embeddings']!r})"
        )
        return None
    if kind == "default" or (kind == "linear" and rope.get("factor") == 1):
        if unused:
            notes.append(f"{next(iter(kinds))} is {kind!r}: no effect of {', '.join(unused)}")
        return None
    require(
        kind == "yarn",
        next(iter(kinds), name),
        kind,
        "must be 'yarn', or 'default' for plain rotary embedding; no other scaling is supported",
    )
    return _read_yarn(name, rope, values, notes)


def _read_yarn(name: str, rope: dict[str, Any], values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    if "factor" not in rope:
        raise missing(f"{name}.factor", (), "YaRN needs it")
    key = "original_max_position_embeddings"
    lengths = {f"{name}.{key}": rope[key]} if key in rope else {}
    lengths |= {key: values[key]} if key in values else {}
    initial = values.get("initial_context_length")
    if not lengths:
        # transformers does this as well. It does not know initial_context_length, which must not differ then.
        lengths = {f"max_position_embeddings (for want of {name}.{key})": values["max_position_embeddings"]}
        lengths |= {} if initial is None else {"initial_context_length": initial}
    length = agreed(lengths)
    if initial not in (None, length):
        used = f"{next(iter(lengths))} is {length!r}: {length!r} is used"
        notes.append(f"initial_context_length is {initial!r}, but {used}")
    factor = rope["factor"]
    if factor is None:
        ends = [number("max_position_embeddings", values["max_position_embeddings"]), number(key, length)]
        factor = ends[0] / ends[1]
        notes.append(f"{name}.factor is null: {factor} is used, max_position_embeddings / {key}")
    _check_concentration(name, {**rope, "factor": factor})
    # `factor` counts as written, as in transformers 5; 4.55 took the ratio of the two lengths in its place.
    # Both betas and truncate have transformers' defaults. For truncate that is true, though the released
    # models have it false.
    return {
        "factor": factor,
        "beta_fast": 32.0 if rope.get("beta_fast") is None else rope["beta_fast"],
        "beta_slow": 1.0 if rope.get("beta_slow") is None else rope["beta_slow"],
        "truncate": rope.get("truncate", True),
        key: length,
    }


def _check_concentration(name: str, rope: dict[str, Any]) -> None:
    """Refuses a factor on cos and sin other than YaRN's own, 0.1 ln(factor) + 1.

    transformers takes `attention_factor`; without it the ratio of two such terms, one scaled by `mscale` and
    one by `mscale_all_dim`, if neither is missing or 0; and else YaRN's own.
    """
    factor = number(f"{name}.factor", rope["factor"])
    given = {key: rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim")}
    given = {key: number(f"{name}.{key}", value) for key, value in given.items() if value is not None}

    def term(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if "attention_factor" in given:
        require(
            math.isclose(given["attention_factor"], term(1), rel_tol=1e-6),
            f"{name}.attention_factor",
            given["attention_factor"],
            f"must be 0.1 ln(factor) + 1 = {term(1)}, or left out",
        )
    elif given.get("mscale") and given.get("mscale_all_dim"):
        require(
            math.isclose(term(given["mscale"]), term(1) * term(given["mscale_all_dim"]), rel_tol=1e-6),
            f"{name}.mscale",
            given["mscale"],
            f"with mscale_all_dim {given['mscale_all_dim']!r} it gives a factor on cos and sin other than "
            f"0.1 ln(factor) + 1 = {term(1)}; leave both out",
        )
