"""Writes a model's config.json, so that both transformers 4.55 and 5 read it."""

from gptoss_jax.config.base import require
from gptoss_jax.config.hf import FIELDS, MXFP4_BLOCK_SIZE, Values

# transformers requires floats here; `ModelConfig` also accepts integers.
FLOATS = (
    "rms_norm_eps", "attention_dropout", "initializer_range", "router_aux_loss_coef", "swiglu_alpha",
    "swiglu_limit",
)  # fmt: skip
# Modules that are never quantized, by their names in transformers.
UNPACKED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def write(fields: Values, experts: str) -> Values:
    """Converts `ModelConfig` fields, with explicit layer types, to the content of a published config.json.

    Raises ValueError as documented in `ModelConfig.to_hf`.
    """
    formats = ("bfloat16", "float32", "mxfp4")
    require(experts in formats, "experts", experts, f"must be one of {', '.join(map(repr, formats))}")
    allowed = "the published format has no adapters: merge them into the weights, or export the adapter"
    require(fields["lora"] is None, "model.lora", fields["lora"], allowed)
    _refuse_inexpressible(fields, experts)
    scaling, theta = fields["rope_scaling"], float(fields["rope_theta"])
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": "yarn", **scaling}
    rope |= {name: float(rope[name]) for name in ("factor", "beta_fast", "beta_slow") if name in rope}
    length = "max_position_embeddings" if scaling is None else "original_max_position_embeddings"
    dtype = "float32" if experts == "float32" else "bfloat16"
    values = {name: fields[name] for name in FIELDS} | {name: float(fields[name]) for name in FLOATS}
    values |= {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "use_cache": True,
        "experts_per_token": fields["num_experts_per_tok"],
        "initial_context_length": (fields if scaling is None else scaling)[length],
        "output_router_logits": False,
        # transformers 5 prefers rope_scaling to rope_parameters. transformers 4 reads only rope_scaling, and
        # uses the released models' YaRN if it is missing rather than null.
        "rope_parameters": {**rope, "rope_theta": theta},
        "rope_scaling": None if scaling is None else rope,
        "rope_theta": theta,
        # `dtype` is the name in transformers 5, `torch_dtype` in 4.
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if experts == "mxfp4":
        values["quantization_config"] = {"modules_to_not_convert": [*UNPACKED], "quant_method": "mxfp4"}
    return dict(sorted(values.items()))


def _refuse_inexpressible(fields: Values, experts: str) -> None:
    packed = experts == "mxfp4"
    multiples = f"MXFP4 requires a multiple of {MXFP4_BLOCK_SIZE} (experts='bfloat16' allows any size)"
    limit = "the format requires a number (one far above all activations, such as 1e4, is equivalent)"
    reasons = {
        "sink_tokens": (fields["sink_tokens"] > 0, "the format requires 0"),
        "swiglu_up_offset": (fields["swiglu_up_offset"] != 1, "the format implies 1"),
        "swiglu_limit": (fields["swiglu_limit"] is None, limit),
        "hidden_size": (packed and fields["hidden_size"] % MXFP4_BLOCK_SIZE, multiples),
        "intermediate_size": (packed and fields["intermediate_size"] % MXFP4_BLOCK_SIZE, multiples),
    }
    found = [f"{name} is {fields[name]}, but {why}" for name, (bad, why) in reasons.items() if bad]
    if found:
        raise ValueError(
            f"this model cannot be written in the published format: {'; '.join(found)}. A run folder, which "
            "this project reads, stores it unchanged"
        )
