"""Writes a model's config.json, so that both transformers 4.55 and 5 read it."""

from typing import Any

from gptoss_jax.config.base import require
from gptoss_jax.config.hf import DEFAULTS, MXFP4_GROUP, OPTIONAL, REQUIRED


def write(fields: dict[str, Any], experts: str) -> dict[str, Any]:
    """The published config.json for all fields of a `ModelConfig`, `layer_types` spelled out."""
    forms = ("bfloat16", "float32", "mxfp4")
    require(experts in forms, "experts", experts, f"must be one of {', '.join(map(repr, forms))}")
    _refuse_inexpressible(fields, experts)
    scaling = fields["rope_scaling"]
    values = {name: fields[name] for name in (*REQUIRED, *DEFAULTS, *OPTIONAL)}
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
