"""Reads the config.json files of published gpt-oss models; `hf_write.py` writes them.

Three dialects are read: transformers 4.55's (`rope_theta` and `rope_scaling`), transformers 5's
(`rope_parameters` with the theta inside), and OpenAI's own, `original/config.json`.

A file that transformers can load is interpreted the same way here. Where the interpretation is not obvious
(an unknown, leftover or missing field), a warning names the field and the value used. It is an error if
transformers 4.55 and 5 disagree, if the file asks for an unsupported feature, or if a size is missing.
"""

import math
import os
from collections.abc import Collection
from typing import Any

from gptoss_jax.config.base import nearest, read_json, require
from gptoss_jax.config.paths import user_path

# Number of MXFP4 weights that share a scale, along the input axis of a matrix.
MXFP4_BLOCK_SIZE = 32

# No defaults: the released models differ in these fields, or the weight shapes depend on them.
REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_local_experts",
)  # fmt: skip
# Same in both released models and all transformers versions; used, with a warning, if a field is missing.
DEFAULTS = {
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
# Published files omit these. `ModelConfig` has the same defaults as transformers.
OPTIONAL = (
    "attention_bias", "attention_dropout", "initializer_range", "layer_types", "swiglu_alpha", "swiglu_limit",
    "tie_word_embeddings",
)  # fmt: skip
FIELDS = (*REQUIRED, *DEFAULTS, *OPTIONAL)
# Fields handled separately below.
SPECIAL = (
    "model_type", "hidden_act", "quantization_config", "router_aux_loss_coef", "output_router_logits",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "initial_context_length",
    "original_max_position_embeddings", "experts_per_token", "num_experts", "per_layer_config",
)  # fmt: skip
YARN = (
    "factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings", "attention_factor",
    "mscale", "mscale_all_dim",
)  # fmt: skip
ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *YARN)

# Fields that transformers and common tools write for every model and that do not affect its outputs.
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

# OpenAI's file has all of these, two of them under a different name, and no model_type.
ORIGINAL = {name: name for name in (*REQUIRED, "sliding_window", "rope_theta")}
ORIGINAL |= {"num_local_experts": "num_experts", "num_experts_per_tok": "experts_per_token"}
ORIGINAL_ROPE = ("initial_context_length", "rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta")

PRESENT = "every gpt-oss config.json has it"
ROPE_TYPES = "must be 'yarn', or 'default' for plain rotary embedding"

Values = dict[str, Any]


def load(source: str | os.PathLike | Values) -> tuple[Values, str]:
    """Returns the content of a published config.json, and a prefix for its error messages."""
    if isinstance(source, dict):
        return source, ""
    path = user_path(source, "config")
    if path.is_dir():
        found = [file for name in ("", "original") if (file := path / name / "config.json").is_file()]
        if not found:
            raise ValueError(f"{path}: this folder has neither config.json nor original/config.json")
        path = found[0]
    return read_json(path), f"{path}: "


def read(values: Values) -> tuple[Values, list[str]]:
    """Returns the `ModelConfig` fields of a published config.json, and warnings.

    Raises ValueError as documented in `ModelConfig.from_hf`, which checks the types of the fields afterwards.
    """
    notes: list[str] = []
    if "swiglu_limit" in values:  # the format has no null for "no limit"
        _finite("swiglu_limit", values["swiglu_limit"])
    is_original = "model_type" not in values and values.keys() & {"num_experts", *ORIGINAL_ROPE[1:]}
    return (_read_original if is_original else _read_hugging_face)(values, notes), notes


def _pick(values: Values, *names: str) -> Values:
    return {name: values[name] for name in names if name in values}


def _agreed(said: Values, notes: list[str] | None = None) -> Any:
    """Returns the value of the first of several fields with the same meaning.

    If another one differs, adds a warning to `notes`, or raises ValueError if `notes` is None.
    """
    (first, value), *others = said.items()
    for name, other in others:
        if other == value:
            continue
        if notes is None:
            allowed = f"but {first} is {value!r}: they mean the same and must agree"
            raise ValueError(f"{name} is {other!r}, {allowed}")
        notes.append(f"{name} is {other!r}, but {first} is {value!r}: {value!r} is used")
    return value


def _finite(name: str, value: Any) -> float:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(fine, name, value, "must be a finite number")
    return value


def _check_present(values: Values, names: Collection[str], known: Collection[str]) -> None:
    """Raises ValueError for a missing required field; the message names an unknown field spelled like it."""
    for name in names:
        if name not in values:
            near = nearest(name, values.keys() - {*known})
            raise ValueError(f"{name} is missing: {PRESENT}" + (f"; the file has {near}" if near else ""))


def _note_unknown(names: Collection[str], known: Collection[str], notes: list[str], path: str = "") -> None:
    unknown = [(path + name, nearest(name, known)) for name in sorted({*names} - {*known})]
    if unknown:
        spelled = [f"{name} (did you mean {near}?)" if near else name for name, near in unknown]
        notes.append(f"unknown fields are ignored: {', '.join(spelled)}")


def _read_original(values: Values, notes: list[str]) -> Values:
    names = (*ORIGINAL.values(), *ORIGINAL_ROPE)
    _note_unknown(values, {*names, "swiglu_limit"}, notes)
    _check_present(values, names, names)
    length, factor, slow, fast = (_finite(name, values[name]) for name in ORIGINAL_ROPE)
    # OpenAI's code does not round the ends of the ramp, and skips YaRN for a factor of 1.
    yarn = {"factor": factor, "beta_fast": fast, "beta_slow": slow, "truncate": False}
    yarn["original_max_position_embeddings"] = length
    # OpenAI's RMSNorm hardcodes an epsilon of 1e-5, which is also the default here.
    fields = {field: values[name] for field, name in ORIGINAL.items()} | _pick(values, "swiglu_limit")
    fields["max_position_embeddings"] = int(length * factor)
    return fields | {"rope_scaling": None if factor == 1 else yarn}


def _read_hugging_face(values: Values, notes: list[str]) -> Values:
    for name in ("quantization_config", "rope_scaling", "rope_parameters"):
        value = values.get(name)
        require(isinstance(value, dict | None), name, value, "must be an object or null")
    _check_kind(values, notes)
    known = {*FIELDS, *SPECIAL}
    _note_unknown(values.keys() - IGNORED, known, notes)
    fields = _pick(values, *FIELDS)
    if "num_experts" in values:
        fields["num_local_experts"] = _agreed(_pick(values, "num_local_experts", "num_experts"))
    _check_present(values | fields, REQUIRED, known | IGNORED)
    _fill_in(fields, values, notes)
    asked = values.get("output_router_logits", False)
    require(isinstance(asked, bool), "output_router_logits", asked, "must be True or False")
    fields["router_aux_loss_coef"] = values.get("router_aux_loss_coef", 0.0) if asked else 0.0
    return fields | _read_rope(values | fields, notes)


def _check_kind(values: Values, notes: list[str]) -> None:
    """Raises ValueError for the config of a different model, and for unsupported features."""
    if "model_type" not in values:
        if isinstance(values.get("model"), dict):
            allowed = "this is the config.json of a run folder, which TrainConfig.load reads"
            raise ValueError(f"model_type is missing: {allowed}")
        if values.get("architectures") != ["GptOssForCausalLM"]:
            raise ValueError("model_type is missing: must be 'gpt_oss'")
        notes.append("model_type is missing: 'gpt_oss' is used, based on architectures")
    kind, layers = values.get("model_type", "gpt_oss"), values.get("per_layer_config")
    require(kind == "gpt_oss", "model_type", kind, "must be 'gpt_oss'")
    require(not layers, "per_layer_config", layers, "must be left out, because all layers have one config")
    packed, activation = values.get("quantization_config"), values.get("hidden_act", "silu")
    if packed is not None:
        method = packed.get("quant_method")
        require(method == "mxfp4", "quantization_config.quant_method", method, "must be 'mxfp4'")
    if activation != "silu":
        notes.append(f"hidden_act is {activation!r}: ignored, gpt-oss always uses its clamped SwiGLU")


def _fill_in(fields: Values, values: Values, notes: list[str]) -> None:
    """Fills in `fields` that the file omits, sets to null, or has under an older name."""
    experts = _pick(values, "num_experts_per_tok", "experts_per_token")
    if experts:
        used = fields["num_experts_per_tok"] = _agreed(experts, notes)
        if "num_experts_per_tok" not in values:
            notes.append(f"num_experts_per_tok is missing: {used!r} is used, from experts_per_token")
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
        notes.append(f"num_key_value_heads is null: {heads!r} is used, one per query head")
    are_sizes = isinstance(width, int) and isinstance(heads, int) and heads > 0
    if fields["head_dim"] is None and are_sizes and width % heads == 0:
        fields["head_dim"] = width // heads
        notes.append(f"head_dim is null: hidden_size / num_attention_heads = {width // heads} is used")
    kinds, layers = fields.get("layer_types"), fields["num_hidden_layers"]
    all_full = isinstance(kinds, list) and "sliding_attention" not in kinds
    if all_full and fields.get("sliding_window", 0) is None:
        del fields["sliding_window"]
    for name in (name for name in DEFAULTS if name not in fields):
        default = fields[name] = DEFAULTS[name]
        unused = ", although all layers use full attention" if name == "sliding_window" and all_full else ""
        absent = "null" if name in values else "missing"
        notes.append(f"{name} is {absent}: {default} is used{unused}")
    alternating = ["sliding_attention", "full_attention"]
    if isinstance(kinds, list) and len(kinds) == layers and kinds == (alternating * layers)[:layers]:
        fields["layer_types"] = None


def _read_rope(values: Values, notes: list[str]) -> Values:
    """Returns `rope_theta` and `rope_scaling` of a Hugging Face file, in any of its dialects."""
    given = _pick(values, "rope_scaling", "rope_parameters")
    if not given:
        # transformers 4.55 and 5 have different defaults.
        raise ValueError(f"rope_parameters is missing: {PRESENT}, or rope_scaling")
    if not any(given.values()):
        # transformers 4.55 writes null for plain RoPE; transformers 5 treats null as a missing field.
        notes.append(f"{next(iter(given))} is null or empty: plain rotary embedding is used, without YaRN")
    # Both transformers versions prefer rope_scaling if the file has both.
    name = next((name for name, rope in given.items() if rope), next(iter(given)))
    rope, other = given[name] or {}, given.get("rope_parameters") or {}
    for key in sorted(rope.keys() & other.keys()):
        _agreed({f"{name}.{key}": rope[key], f"rope_parameters.{key}": other[key]}, notes)
    scaling = _read_scaling(name, rope, values, notes)
    # transformers 4 reads null as plain rotary embedding, regardless of rope_parameters.
    contradicted = name == "rope_parameters" and "rope_scaling" in given and scaling is not None
    require(not contradicted, "rope_scaling", given.get("rope_scaling"), "must agree with rope_parameters")
    thetas = {"rope_theta": values.get("rope_theta"), f"{name}.rope_theta": rope.get("rope_theta")}
    thetas = {place: theta for place, theta in thetas.items() if theta is not None}
    if not thetas:
        thetas["rope_theta"] = 150000.0
        notes.append("rope_theta is missing: 150000.0 is used")
    theta = _agreed(thetas)
    if "rope_theta" not in rope and other.get("rope_theta") is not None:
        _agreed({"rope_theta": theta, "rope_parameters.rope_theta": other["rope_theta"]}, notes)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _read_scaling(name: str, rope: Values, values: Values, notes: list[str]) -> Values | None:
    """Returns the `RopeScaling` fields of the object `rope` in the field `name`; None for plain RoPE."""
    _note_unknown(rope, ROPE, notes, f"{name}.")
    for place, said in ((f"{name}.", rope), ("", values)):
        share = said.get("partial_rotary_factor")
        require(share in (None, 1), f"{place}partial_rotary_factor", share, "must be 1")
    # "type" is the older spelling.
    kinds = {f"{name}.{key}": rope[key] for key in ("rope_type", "type") if key in rope}
    if not kinds and rope.keys() - {"rope_theta", "partial_rotary_factor"}:
        raise ValueError(f"{name}.rope_type is missing: {ROPE_TYPES}")
    kind, field = _agreed(kinds) if kinds else "default", next(iter(kinds), name)
    if kind == "yarn":
        return _read_yarn(name, rope, values, notes)
    if kind == "dynamic":
        # Dynamic scaling changes theta only beyond this length.
        length = values["max_position_embeddings"]
        plain = f"which it equals up to max_position_embeddings ({length!r})"
        notes.append(f"{field} is 'dynamic': plain rotary embedding is used, {plain}")
        return None
    is_plain = kind == "default" or (kind == "linear" and rope.get("factor") == 1)
    require(is_plain, field, kind, f"{ROPE_TYPES}; no other scaling is supported")
    unused = [f"{name}.{key}" for key in YARN if key in rope]
    if unused:
        notes.append(f"{field} is {kind!r}: ignoring {', '.join(unused)}")
    return None


def _read_yarn(name: str, rope: Values, values: Values, notes: list[str]) -> Values:
    if "factor" not in rope:
        raise ValueError(f"{name}.factor is missing: YaRN requires it")
    key, longest = "original_max_position_embeddings", values["max_position_embeddings"]
    initial = {field: n for field, n in _pick(values, "initial_context_length").items() if n is not None}
    lengths = {f"{name}.{key}": rope[key]} if key in rope else {}
    lengths |= _pick(values, key)
    if not lengths:
        # Same fallback as in transformers, which ignores initial_context_length, so that must not differ.
        lengths = {f"max_position_embeddings (used because {name}.{key} is missing)": longest, **initial}
    length = _agreed(lengths)
    _agreed({next(iter(lengths)): length, **initial}, notes)
    factor = rope["factor"]
    if factor is None:
        factor = _finite("max_position_embeddings", longest) / _finite(key, length)
        notes.append(f"{name}.factor is null: {factor} is used, max_position_embeddings / {key}")
    _check_attention_factor(name, rope, _finite(f"{name}.factor", factor))
    # `factor` is used as given, like in transformers 5; 4.55 used the ratio of the two lengths instead.
    # The betas and truncate default to transformers' values: truncate is true there, but false in the
    # released models.
    return {
        "factor": factor,
        "beta_fast": 32.0 if rope.get("beta_fast") is None else rope["beta_fast"],
        "beta_slow": 1.0 if rope.get("beta_slow") is None else rope["beta_slow"],
        "truncate": rope.get("truncate", True),
        key: length,
    }


def _check_attention_factor(name: str, rope: Values, factor: float) -> None:
    """Raises ValueError if cos and sin are scaled by anything but YaRN's 0.1 ln(factor) + 1.

    transformers uses `attention_factor` or, if it is missing and both `mscale` and `mscale_all_dim` are given
    and nonzero, the ratio of two such terms.
    """
    keys = ("attention_factor", "mscale", "mscale_all_dim")
    scale, *mscales = (rope.get(key) and _finite(f"{name}.{key}", rope[key]) for key in keys)
    own = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    fits = scale is None or math.isclose(scale, own, rel_tol=1e-6)
    require(fits, f"{name}.attention_factor", scale, f"must be 0.1 ln(factor) + 1 = {own}, or left out")
    allowed = f"is not supported with mscale_all_dim ({mscales[1]!r}); leave both out"
    require(scale is not None or factor <= 1 or not all(mscales), f"{name}.mscale", mscales[0], allowed)
