"""The config.json files that gpt-oss models are published with, as fields of `ModelConfig` and back.

Three dialects are read: that of transformers 4.55 (`rope_theta` and `rope_scaling`), that of transformers 5
(`rope_parameters` with the theta inside), and OpenAI's own, `original/config.json`. What is written suits
both transformers. Here are only plain dicts; `ModelConfig.from_hf` and `to_hf` are the way in.
"""

import math
import os
import pathlib
from typing import Any

from gptoss_jax.config.checked import read_json, require, unknown_field

# Weights that MXFP4 packs under one scale, along the input axis of a matrix.
MXFP4_GROUP = 32

# Fields that have to be there. Any default would be a guess about somebody else's model.
REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "sliding_window",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
# Fields that may be missing. They then have the value of gpt-oss itself, which is both transformers' default
# and ours: biases, an untied head, alternating layers, swiglu_limit 7, and swiglu_alpha 1.702, which the
# released files leave out.
OPTIONAL = (
    "attention_bias", "attention_dropout", "initializer_range", "layer_types", "swiglu_alpha", "swiglu_limit",
    "tie_word_embeddings",
)  # fmt: skip
# Other names for one thing.
ALIASES = {"experts_per_token": "num_experts_per_tok", "num_experts": "num_local_experts"}
# Fields that are looked at, each in its own way.
SPECIAL = (
    "model_type", "hidden_act", "quantization_config", "router_aux_loss_coef", "output_router_logits",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "initial_context_length",
    "original_max_position_embeddings",
)  # fmt: skip
ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
YARN = (
    "factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings", "attention_factor",
    "mscale", "mscale_all_dim",
)  # fmt: skip

# Fields that transformers writes for every kind of model, and why none of them bears on the architecture.
IGNORED = {
    "who wrote the file, from where, and with which class": (
        "_name_or_path", "name_or_path", "_commit_hash", "architectures", "transformers_version",
        "unsloth_fixed", "unsloth_version", "model_name", "auto_map",
    ),
    "the type that weights are stored in, which the weights themselves tell": (
        "dtype", "torch_dtype", "use_bfloat16",
    ),
    "ids of tokens, which are the tokenizer's": (
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
        "forced_bos_token_id", "forced_eos_token_id", "tokenizer_class", "prefix",
    ),
    "what a call returns, keeps, or computes with": (
        "return_dict", "output_hidden_states", "output_attentions", "use_cache", "torchscript",
        "tf_legacy_loss", "chunk_size_feed_forward", "attn_implementation", "experts_implementation",
        "_attn_implementation_autoset", "_attn_implementation", "tie_last_hidden_states", "use_kernels",
    ),
    "heads for other tasks": (
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    ),
    "kinds of models that gpt-oss is not": (
        "is_encoder_decoder", "is_decoder", "add_cross_attention", "cross_attention_hidden_size",
        "tie_encoder_decoder", "pruned_heads",
    ),
    "how to sample, from before generation_config.json": (
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
        "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
        "num_return_sequences", "output_scores", "return_dict_in_generate", "remove_invalid_values",
        "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    ),
}  # fmt: skip

# OpenAI's own file has these, all of them, and no model_type.
ORIGINAL = {
    "num_hidden_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "head_dim": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
    "rope_theta": "rope_theta",
}
ORIGINAL_ROPE = ("initial_context_length", "rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta")


def load(source: str | os.PathLike | dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The content of a published config.json, and what an error about it begins with."""
    if isinstance(source, dict):
        return source, ""
    path = pathlib.Path(source)
    if path.is_dir():
        places = (path / "config.json", path / "original" / "config.json")
        found = [place for place in places if place.is_file()]
        if not found:
            raise ValueError(f"{path}: this folder has neither config.json nor original/config.json")
        path = found[0]
    return read_json(path), f"{path}: "


def read(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that a published config.json gives. `ModelConfig` checks their types."""
    if "model_type" not in values and values.keys() & {"num_experts", *ORIGINAL_ROPE[1:]}:
        return _read_original(values)
    return _read_hugging_face(values)


def _missing(name: str, allowed: str = "a config.json of gpt-oss has it") -> ValueError:
    return ValueError(f"{name} is missing: {allowed}")


def _agreed(said: dict[str, Any]) -> Any:
    """The one value of several fields that mean the same."""
    (first, value), *others = said.items()
    for name, other in others:
        if other != value:
            raise ValueError(
                f"{name} is {other!r}, but {first} is {value!r}: they mean the same and must agree"
            )
    return value


def _number(name: str, value: Any) -> float:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(fine, name, value, "must be a finite number")
    return value


def _read_original(values: dict[str, Any]) -> dict[str, Any]:
    known = (*ORIGINAL, *ORIGINAL_ROPE, "swiglu_limit")
    for name in values:
        if name not in known:
            raise unknown_field(name, known)
    for name in (*ORIGINAL, *ORIGINAL_ROPE):
        if name not in values:
            raise _missing(name)
    length, factor, slow, fast = (_number(name, values[name]) for name in ORIGINAL_ROPE)
    yarn = {
        "factor": factor,
        "beta_fast": fast,
        "beta_slow": slow,
        # OpenAI's code does not round the ends of the ramp.
        "truncate": False,
        "original_max_position_embeddings": length,
    }
    fields = {ours: values[name] for name, ours in ORIGINAL.items()}
    # Its RMSNorm has 1e-5 built in, which is the default here too.
    fields |= _swiglu_limit(values)
    # With a factor of 1 OpenAI's code leaves YaRN out.
    fields["rope_scaling"] = None if factor == 1 else yarn
    fields["max_position_embeddings"] = int(length * factor)
    return fields


def _swiglu_limit(values: dict[str, Any]) -> dict[str, Any]:
    """`swiglu_limit`, where the file has one. `ModelConfig` has None for no limit; the format has not."""
    if "swiglu_limit" not in values:
        return {}
    return {"swiglu_limit": _number("swiglu_limit", values["swiglu_limit"])}


def _read_hugging_face(values: dict[str, Any]) -> dict[str, Any]:
    if "model_type" not in values and isinstance(values.get("model"), dict):
        raise _missing(
            "model_type",
            "this is no published config.json but that of a run folder, which TrainConfig.load reads",
        )
    if "model_type" not in values:
        raise _missing("model_type", "must be 'gpt_oss'")
    require(values["model_type"] == "gpt_oss", "model_type", values["model_type"], "must be 'gpt_oss'")
    known = (*REQUIRED, *OPTIONAL, *ALIASES, *SPECIAL)
    ignored = {name for group in IGNORED.values() for name in group}
    for name in values:
        if name not in known and name not in ignored:
            raise unknown_field(name, known)

    fields = {name: values[name] for name in (*REQUIRED, *OPTIONAL) if name in values}
    for alias, name in ALIASES.items():
        if alias in values:
            fields[name] = _agreed({n: values[n] for n in (name, alias) if n in values})
    for name in REQUIRED:
        if name not in fields:
            raise _missing(name)
    activation = values.get("hidden_act", "silu")
    require(activation == "silu", "hidden_act", activation, "must be 'silu'")
    packed = values.get("quantization_config")
    if packed is not None:
        require(isinstance(packed, dict), "quantization_config", packed, "must be an object or null")
        method = packed.get("quant_method")
        require(method == "mxfp4", "quantization_config.quant_method", method, "must be 'mxfp4'")
    fields |= _swiglu_limit(values)
    if _alternates(fields.get("layer_types"), fields["num_hidden_layers"]):
        fields["layer_types"] = None
    asked = values.get("output_router_logits", False)
    require(isinstance(asked, bool), "output_router_logits", asked, "must be True or False")
    fields["router_aux_loss_coef"] = values.get("router_aux_loss_coef", 0.0) if asked else 0.0
    return fields | _read_rope(values)


def _alternates(kinds: Any, layers: Any) -> bool:
    both = ("sliding_attention", "full_attention")
    return (
        isinstance(kinds, list)
        and len(kinds) == layers
        and all(kind == both[i % 2] for i, kind in enumerate(kinds))
    )


def _read_rope(values: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a Hugging Face file, from wherever it has them."""
    said = {}
    # To transformers 5 a null here is as if the field were missing.
    if values.get("rope_parameters") is not None:
        said["rope_parameters"] = values["rope_parameters"]
    # A null is how transformers 4 writes plain rotary frequencies.
    if "rope_scaling" in values:
        said["rope_scaling"] = values["rope_scaling"] if values["rope_scaling"] is not None else {}
    if not said:
        raise _missing("rope_parameters", "a config.json of gpt-oss has it, or rope_scaling")

    thetas = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    readings = {}
    for name, rope in said.items():
        require(isinstance(rope, dict), name, rope, "must be an object or null")
        if "rope_theta" in rope:
            thetas[f"{name}.rope_theta"] = rope["rope_theta"]
        readings[name] = _read_scaling(name, rope, values)
    if not thetas:
        raise _missing("rope_theta")
    (first, scaling), *others = readings.items()
    for other, reading in others:
        for key in ("rope_type", *scaling):
            _agreed({f"{first}.{key}": scaling[key], f"{other}.{key}": reading[key]})
    plain = scaling.pop("rope_type") == "default"
    return {"rope_theta": _agreed(thetas), "rope_scaling": None if plain else scaling}


def _read_scaling(name: str, rope: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `RopeScaling`, and `rope_type`, from the object `rope` in the field `name`."""
    # "type" is the older spelling.
    kinds = {f"{name}.{key}": rope[key] for key in ("rope_type", "type") if key in rope}
    kind = _agreed(kinds) if kinds else "default"
    require(
        kind in ("yarn", "default"),
        next(iter(kinds), name),
        kind,
        "must be 'yarn', or 'default' for plain rope",
    )
    for key in rope:
        if key not in ROPE + YARN:
            raise unknown_field(key, ROPE + YARN, f"{name}.")
        require(
            kind == "yarn" or key in ROPE,
            f"{name}.{key}",
            rope[key],
            "must be left out, as rope_type is not 'yarn'",
        )
    for place, said in ((name + ".", rope), ("", values)):
        share = said.get("partial_rotary_factor")
        require(
            share in (None, 1), f"{place}partial_rotary_factor", share, "must be 1, all of the head turns"
        )
    if kind == "default":
        return {"rope_type": kind}

    if "factor" not in rope:
        raise _missing(f"{name}.factor")
    _check_concentration(name, rope)
    # `factor` counts as written, as in transformers 5; 4.55 took the ratio of the two lengths in its place.
    # Both betas and truncate are what transformers takes where they are missing. For truncate that is true,
    # though the released models have it false.
    scaling = {"rope_type": kind, "factor": rope["factor"]}
    scaling["beta_fast"] = 32.0 if rope.get("beta_fast") is None else rope["beta_fast"]
    scaling["beta_slow"] = 1.0 if rope.get("beta_slow") is None else rope["beta_slow"]
    scaling["truncate"] = rope.get("truncate", True)
    key = "original_max_position_embeddings"
    lengths = {f"{name}.{key}": rope[key]} if key in rope else {}
    lengths |= {key: values[key]} if key in values else {}
    if not lengths:
        # transformers does this as well.
        lengths = {f"max_position_embeddings (for want of {name}.{key})": values["max_position_embeddings"]}
    if "initial_context_length" in values:
        lengths["initial_context_length"] = values["initial_context_length"]
    scaling[key] = _agreed(lengths)
    return scaling


def _check_concentration(name: str, rope: dict[str, Any]) -> None:
    """Refuses a factor on cos and sin other than YaRN's own, 0.1 ln(factor) + 1.

    transformers takes `attention_factor`; without it the ratio of two such terms, one scaled by `mscale` and
    one by `mscale_all_dim`, if neither is missing or 0; and else YaRN's own.
    """
    factor = _number(f"{name}.factor", rope["factor"])
    given = {key: rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim")}
    given = {key: _number(f"{name}.{key}", value) for key, value in given.items() if value is not None}

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


def write(fields: dict[str, Any], experts: str) -> dict[str, Any]:
    """The published config.json for all fields of a `ModelConfig`, `layer_types` spelled out."""
    forms = ("bfloat16", "float32", "mxfp4")
    require(experts in forms, "experts", experts, f"must be one of {', '.join(map(repr, forms))}")
    _refuse_inexpressible(fields, experts)
    scaling = fields["rope_scaling"]
    values = {name: fields[name] for name in (*REQUIRED, *OPTIONAL)}
    theta = float(fields["rope_theta"])
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": "yarn", **scaling}
    # transformers wants a float in these, where an integer does for us.
    for name in ("rms_norm_eps", "attention_dropout", "initializer_range", "swiglu_alpha", "swiglu_limit"):
        values[name] = float(values[name])
    for name in () if scaling is None else ("factor", "beta_fast", "beta_slow"):
        rope[name] = float(rope[name])
    values |= {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "use_cache": True,
        "experts_per_token": fields["num_experts_per_tok"],
        "initial_context_length": (
            fields["max_position_embeddings"]
            if scaling is None
            else scaling["original_max_position_embeddings"]
        ),
        "router_aux_loss_coef": float(fields["router_aux_loss_coef"]),
        "output_router_logits": False,
        # transformers 5 reads rope_scaling in place of rope_parameters where both are there; 4 knows only the
        # former, and takes its absence, unlike null, for the released models' YaRN.
        "rope_parameters": {**rope, "rope_theta": theta},
        "rope_scaling": None if scaling is None else rope,
        "rope_theta": theta,
    }
    # The name of old and the name of new transformers.
    values["dtype"] = values["torch_dtype"] = "float32" if experts == "float32" else "bfloat16"
    if experts == "mxfp4":
        values["quantization_config"] = {
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
            "quant_method": "mxfp4",
        }  # fmt: skip
    return dict(sorted(values.items()))


def _refuse_inexpressible(fields: dict[str, Any], experts: str) -> None:
    reasons = []
    if fields["sink_tokens"] > 0:
        reasons.append(f"sink_tokens is {fields['sink_tokens']}, where the format has none (0)")
    if fields["swiglu_up_offset"] != 1:
        reasons.append(f"swiglu_up_offset is {fields['swiglu_up_offset']}, where the format has 1")
    if fields["swiglu_limit"] is None:
        reasons.append(
            "swiglu_limit is None, where the format has a number (one far above all activations, such as "
            "1e4, is the same function)"
        )
    for name in ("hidden_size", "intermediate_size"):
        if experts == "mxfp4" and fields[name] % MXFP4_GROUP:
            reasons.append(
                f"{name} is {fields[name]}, where MXFP4 takes multiples of {MXFP4_GROUP} (experts='bfloat16' "
                "takes any)"
            )
    if reasons:
        raise ValueError(
            f"this model cannot be written in the published format: {'; '.join(reasons)}. A model that has "
            "to stay as it is can be kept as a run folder, which this project reads"
        )
