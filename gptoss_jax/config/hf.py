"""Reads the config.json files that gpt-oss models are published with (`published_write.py` writes them).

Three dialects are read: that of transformers 4.55 (`rope_theta` and `rope_scaling`), that of transformers 5
(`rope_parameters` with the theta inside), and OpenAI's own, `original/config.json`. This module works on
plain dicts; `ModelConfig.from_hf` calls it.

A file that transformers loads is read with the same meaning. Where that meaning is not plain from the file
(an unknown, leftover or missing field), a warning names the field and the value used. An error is raised
where transformers 4.55 and 5 disagree, where the model cannot do what the file asks, and where a size is
missing.
"""

import os
from collections.abc import Collection
from typing import Any

from gptoss_jax.config.base import agreed, list_unknown, missing, number, read_json, require
from gptoss_jax.config.hf_rope import read_rope
from gptoss_jax.config.paths import user_path

# Weights that MXFP4 packs under one scale, along the input axis of a matrix.
MXFP4_GROUP = 32

# Fields that must be there: the released models differ in them, or the weights' shapes depend on them.
REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_local_experts",
)  # fmt: skip
# Fields with one value in both released models and as the default of every version of transformers. That
# value is used, with a warning, where the field is missing.
DEFAULTS = {
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
# Fields that published files leave out. `ModelConfig` has the same defaults as transformers.
OPTIONAL = (
    "attention_bias", "attention_dropout", "initializer_range", "layer_types", "swiglu_alpha", "swiglu_limit",
    "tie_word_embeddings",
)  # fmt: skip
# Fields that are read by code of their own below.
SPECIAL = (
    "model_type", "hidden_act", "quantization_config", "router_aux_loss_coef", "output_router_logits",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "initial_context_length",
    "original_max_position_embeddings", "experts_per_token", "num_experts", "per_layer_config",
)  # fmt: skip
KNOWN = {*REQUIRED, *DEFAULTS, *OPTIONAL, *SPECIAL}
PRESENT = "a config.json of gpt-oss has it"

# Fields that transformers and common tools write for every model and that do not change what it computes.
IGNORED = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "add_cross_attention", "architectures", "attn_implementation", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "experts_implementation",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length",
    "model_name", "name_or_path", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "prefix", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_last_hidden_states", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "transformers_weights", "typical_p",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache", "use_kernels",
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
    """Returns the content of a published config.json, and what an error about it begins with."""
    if isinstance(source, dict):
        return source, ""
    path = user_path(source, "config")
    if path.is_dir():
        places = (path / "config.json", path / "original" / "config.json")
        found = [place for place in places if place.is_file()]
        if not found:
            raise ValueError(f"{path}: this folder has neither config.json nor original/config.json")
        path = found[0]
    return read_json(path), f"{path}: "


def read(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the fields of `ModelConfig` that a published config.json gives, and what to warn of.

    `ModelConfig` checks the types of the fields.
    """
    notes: list[str] = []
    if "model_type" not in values and values.keys() & {"num_experts", *ORIGINAL_ROPE[1:]}:
        return _read_original(values, notes), notes
    return _read_hugging_face(values, notes), notes


def _note_unknown(names: Collection[str], known: Collection[str], notes: list[str]) -> None:
    unknown = list_unknown(names, known)
    if unknown:
        notes.append(f"unknown fields are ignored: {unknown}")


def _read_original(values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    _note_unknown(values, {*ORIGINAL, *ORIGINAL_ROPE, "swiglu_limit"}, notes)
    for name in (*ORIGINAL, *ORIGINAL_ROPE):
        if name not in values:
            raise missing(name, values.keys() - {*ORIGINAL, *ORIGINAL_ROPE}, PRESENT)
    length, factor, slow, fast = (number(name, values[name]) for name in ORIGINAL_ROPE)
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
    """Returns `swiglu_limit`, where the file has one. The format has no null for "no limit"."""
    if "swiglu_limit" not in values:
        return {}
    return {"swiglu_limit": number("swiglu_limit", values["swiglu_limit"])}


def _read_hugging_face(values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    _check_kind(values, notes)
    _note_unknown(values.keys() - IGNORED, KNOWN, notes)
    fields = {name: values[name] for name in (*REQUIRED, *DEFAULTS, *OPTIONAL) if name in values}
    if "num_experts" in values:
        names = ("num_local_experts", "num_experts")
        fields["num_local_experts"] = agreed({name: values[name] for name in names if name in values})
    for name in REQUIRED:
        if name not in fields:
            raise missing(name, values.keys() - KNOWN - IGNORED, PRESENT)
    _fill_in(fields, values, notes)
    fields |= _swiglu_limit(values)
    asked = values.get("output_router_logits", False)
    require(isinstance(asked, bool), "output_router_logits", asked, "must be True or False")
    fields["router_aux_loss_coef"] = values.get("router_aux_loss_coef", 0.0) if asked else 0.0
    return fields | read_rope({**values, **fields}, notes)


def _check_kind(values: dict[str, Any], notes: list[str]) -> None:
    """Raises ValueError for a file of another model, and for features that this model does not have."""
    if "model_type" not in values and isinstance(values.get("model"), dict):
        raise ValueError(
            "model_type is missing: this is no published config.json but that of a run folder, which "
            "TrainConfig.load reads"
        )
    if "model_type" not in values:
        if values.get("architectures") != ["GptOssForCausalLM"]:
            raise ValueError("model_type is missing: must be 'gpt_oss'")
        notes.append("model_type is missing: 'gpt_oss' is used, as architectures says")
    kind = values.get("model_type", "gpt_oss")
    require(kind == "gpt_oss", "model_type", kind, "must be 'gpt_oss'")
    layers = values.get("per_layer_config")
    require(not layers, "per_layer_config", layers, "must be left out, because all layers have one config")
    packed = values.get("quantization_config")
    if packed is not None:
        require(isinstance(packed, dict), "quantization_config", packed, "must be an object or null")
        method = packed.get("quant_method")
        require(method == "mxfp4", "quantization_config.quant_method", method, "must be 'mxfp4'")
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        notes.append(f"hidden_act is {activation!r}: not used, gpt-oss always computes its clamped SwiGLU")


def _fill_in(fields: dict[str, Any], values: dict[str, Any], notes: list[str]) -> None:
    """Completes `fields` where the file leaves a field out, has null, or has an older name for it."""
    name, old = "num_experts_per_tok", "experts_per_token"
    if old in values and name not in fields:
        fields[name] = values[old]
        notes.append(f"{name} is missing: {fields[name]!r} is used, as {old} says")
    elif old in values and values[old] != fields[name]:
        notes.append(f"{old} is {values[old]!r}, but {name} is {fields[name]!r}: {fields[name]!r} is used")
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
        notes.append(
            f"num_key_value_heads is null: {fields['num_attention_heads']!r} is used, one per query head"
        )
    if fields["head_dim"] is None:
        width, heads = fields["hidden_size"], fields["num_attention_heads"]
        whole = isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0
        require(
            whole, "head_dim", None, "must be an integer, as num_attention_heads does not divide hidden_size"
        )
        fields["head_dim"] = width // heads
        notes.append(f"head_dim is null: hidden_size / num_attention_heads = {width // heads} is used")
    if fields.get("sliding_window", 0) is None and _none_slides(fields.get("layer_types")):
        del fields["sliding_window"]
    for name, default in DEFAULTS.items():
        if name not in fields:
            said = f"{name} is null" if name in values else f"{name} is missing"
            unused = name == "sliding_window" and _none_slides(fields.get("layer_types"))
            notes.append(f"{said}: {default} is used{', although no layer slides' if unused else ''}")
            fields[name] = default
    if _alternates(fields.get("layer_types"), fields["num_hidden_layers"]):
        fields["layer_types"] = None


def _none_slides(kinds: Any) -> bool:
    return isinstance(kinds, list) and "sliding_attention" not in kinds


def _alternates(kinds: Any, layers: Any) -> bool:
    both = ("sliding_attention", "full_attention")
    return (
        isinstance(kinds, list)
        and len(kinds) == layers
        and all(kind == both[i % 2] for i, kind in enumerate(kinds))
    )
