"""Published config.json files: reading each dialect, rejecting what cannot be expressed, and writing."""

import dataclasses
import json
import pathlib
import runpy

import pytest
from helpers.data import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.config import FULL, SLIDING, ModelConfig, RopeScaling

# A complete file is read without a warning.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")
ROOT = pathlib.Path(__file__).parent.parent

# gpt-oss-20b as written by transformers 4.55, as in the released folder.
HF4 = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
# A small model as written by transformers 5: every attribute, and only rope_parameters.
HF5 = {
    "transformers_version": "5.23.0",
    "architectures": None,
    "output_hidden_states": False,
    "return_dict": True,
    "dtype": None,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
    "num_hidden_layers": 3,
    "num_local_experts": 5,
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "head_dim": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "sliding_window": 4,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "initializer_range": 0.3,
    "max_position_embeddings": 192,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 2.0,
        "beta_slow": 0.25,
        "truncate": True,
        "original_max_position_embeddings": 24,
        "rope_theta": 1000.0,
    },
    "attention_dropout": 0.125,
    "num_experts_per_tok": 2,
    "swiglu_alpha": 1.5,
    "swiglu_limit": 6.0,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": True,
    "use_cache": True,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attention_bias": False,
    "_name_or_path": "",
    "model_type": "gpt_oss",
    "output_attentions": False,
}
HF5_READ = ModelConfig(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=5,
    num_experts_per_tok=2,
    sliding_window=4,
    layer_types=(FULL, SLIDING, FULL),
    max_position_embeddings=192,
    rope_theta=1000.0,
    rope_scaling=RopeScaling(8.0, 2.0, 0.25, True, 24),
    attention_bias=False,
    swiglu_alpha=1.5,
    swiglu_limit=6.0,
    tie_word_embeddings=True,
    attention_dropout=0.125,
    rms_norm_eps=1e-6,
    initializer_range=0.3,
    router_aux_loss_coef=0.001,
)
# gpt-oss-20b's original/config.json.
ORIGINAL = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1.0,
    "rope_ntk_beta": 32.0,
}
YARN = HF4["rope_scaling"]


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


def with_rope(**changes) -> dict:
    return {**HF4, "rope_scaling": {**YARN, **changes}}


def written(config: ModelConfig, experts: str = "bfloat16") -> dict:
    """Returns `to_hf` after a round trip through JSON."""
    return json.loads(json.dumps(config.to_hf(experts)))


# Reading.


def test_the_three_dialects():
    assert ModelConfig.from_hf(HF4) == ModelConfig()
    assert ModelConfig.from_hf(ORIGINAL) == ModelConfig()
    assert ModelConfig.from_hf(HF5) == HF5_READ


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_published_files_are_the_presets(size):
    path = shared_data(f"configs/gpt-oss-{size}.json")
    preset = runpy.run_path(str(ROOT / "configs" / f"gpt_oss_{size}.py"))["config"].model
    untrained = dataclasses.replace(preset, router_aux_loss_coef=0.0, remat="none")
    assert ModelConfig.from_hf(path) == untrained
    assert ModelConfig.from_hf(str(path)) == untrained
    assert ModelConfig.from_hf(untrained.to_hf("mxfp4")) == untrained
    # Every field of the published file that describes the model is in ours, too.
    ours, theirs = written(untrained, "mxfp4"), json.loads(path.read_text())
    rest = {"eos_token_id", "pad_token_id", "transformers_version", "router_aux_loss_coef"}
    assert {name: ours.get(name) for name in theirs if name not in rest} == without(theirs, *rest)


def test_config_json_takes_precedence_over_the_original(tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_text(json.dumps({**ORIGINAL, "vocab_size": 11}))
    assert ModelConfig.from_hf(tmp_path).vocab_size == 11
    assert ModelConfig.from_hf(str(tmp_path / "original")).vocab_size == 11
    (tmp_path / "config.json").write_text(json.dumps({**HF4, "vocab_size": 13}))
    assert ModelConfig.from_hf(tmp_path).vocab_size == 13


def test_the_format_of_the_weights_is_not_the_architecture():
    assert HF4["quantization_config"]["quant_method"] == "mxfp4"
    assert ModelConfig.from_hf(HF4).expert_format == "plain"
    assert ModelConfig.from_hf(without(HF4, "quantization_config")) == ModelConfig()
    assert ModelConfig.from_hf({**HF4, "quantization_config": None}) == ModelConfig()


def test_missing_fields():
    few = without(
        HF4, "attention_bias", "attention_dropout", "hidden_act", "initializer_range", "layer_types",
        "swiglu_limit", "tie_word_embeddings", "output_router_logits", "experts_per_token",
        "initial_context_length", "use_cache", "router_aux_loss_coef",
    )  # fmt: skip
    assert "swiglu_alpha" not in few
    config = ModelConfig.from_hf(few)
    assert (config.swiglu_alpha, config.swiglu_limit) == (1.702, 7.0)
    assert config == ModelConfig()
    assert ModelConfig.from_hf(without(ORIGINAL, "swiglu_limit")).swiglu_limit == 7.0


def test_load_balance_loss_needs_output_router_logits():
    assert ModelConfig.from_hf({**HF4, "output_router_logits": True}).router_aux_loss_coef == 0.9
    assert ModelConfig.from_hf(HF4).router_aux_loss_coef == 0.0


def test_the_other_name_of_num_local_experts():
    assert ModelConfig.from_hf({**without(HF4, "num_local_experts"), "num_experts": 32}) == ModelConfig()


def test_layer_types_that_do_not_alternate():
    kinds = ["full_attention", "sliding_attention"] * 12
    assert ModelConfig.from_hf({**HF4, "layer_types": kinds}).layer_types == tuple(kinds)


# Rotary embedding.


def test_yarn_defaults_of_transformers():
    rope = without(YARN, "beta_fast", "beta_slow", "truncate")
    config = ModelConfig.from_hf({**HF4, "rope_scaling": rope})
    assert config.rope_scaling == RopeScaling(32.0, 32.0, 1.0, True, 4096)
    rope = without(YARN, "original_max_position_embeddings")
    config = ModelConfig.from_hf({**without(HF4, "initial_context_length"), "rope_scaling": rope})
    assert config.rope_scaling.original_max_position_embeddings == 131072


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 10000.0},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 10000.0, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": None},
    ],
)
def test_plain_rope(rope):
    config = ModelConfig.from_hf({**without(HF4, "rope_scaling", "rope_theta"), **rope})
    assert config == ModelConfig(rope_scaling=None, rope_theta=10000.0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {**YARN, "rope_theta": 150000.0}},
        {"rope_parameters": YARN, "rope_theta": 150000},
        {"rope_parameters": None, "rope_scaling": YARN, "rope_theta": 150000},
        {"rope_parameters": {**YARN, "rope_theta": 150000.0}, "rope_scaling": YARN, "rope_theta": 150000},
        {"rope_scaling": {**without(YARN, "rope_type"), "type": "yarn"}, "rope_theta": 150000},
        {"rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 150000, "partial_rotary_factor": 1.0},
        {"rope_scaling": {**YARN, "attention_factor": 1.3465735902799727}, "rope_theta": 150000},
        {"rope_scaling": {**YARN, "attention_factor": None, "mscale": 2.0}, "rope_theta": 150000},
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}, "rope_theta": 150000},
    ],
)
def test_equivalent_yarn_settings(rope):
    assert ModelConfig.from_hf({**without(HF4, "rope_scaling", "rope_theta"), **rope}) == ModelConfig()


def test_yarn_of_the_original_format():
    values = {
        **ORIGINAL,
        "initial_context_length": 1000,
        "rope_scaling_factor": 3.0,
        "rope_ntk_alpha": 2,
        "rope_ntk_beta": 16,
    }
    config = ModelConfig.from_hf(values)
    assert config.max_position_embeddings == 3000
    assert config.rope_scaling == RopeScaling(
        factor=3.0, beta_fast=16, beta_slow=2, truncate=False, original_max_position_embeddings=1000
    )
    config = ModelConfig.from_hf({**ORIGINAL, "rope_scaling_factor": 1.0})
    assert config == ModelConfig(rope_scaling=None, max_position_embeddings=4096)


# Files with leftovers and gaps.

ALL_FULL = {**HF4, "layer_types": ["full_attention"] * 24}
# The file, the fields that are not the default, and the one warning.
UNCLEAR = [
    ({**HF4, "experts_per_token": 8}, {}, "experts_per_token is 8, but num_experts_per_tok is 4: 4 is used"),
    (
        {**HF4, "num_experts_per_tok": 2},
        {"num_experts_per_tok": 2},
        "experts_per_token is 4, but num_experts_per_tok is 2: 2 is used",
    ),
    (
        without({**HF4, "experts_per_token": 2}, "num_experts_per_tok"),
        {"num_experts_per_tok": 2},
        "num_experts_per_tok is missing: 2 is used, from experts_per_token",
    ),
    (
        without(HF4, "num_experts_per_tok", "experts_per_token"),
        {},
        "num_experts_per_tok is missing: 4 is used",
    ),
    (without(HF4, "sliding_window"), {}, "sliding_window is missing: 128 is used"),
    (
        without(ALL_FULL, "sliding_window"),
        {"layer_types": (FULL,) * 24},
        "sliding_window is missing: 128 is used, although all layers use full attention",
    ),
    (
        {**ALL_FULL, "sliding_window": None},
        {"layer_types": (FULL,) * 24},
        "sliding_window is null: 128 is used, although all layers use full attention",
    ),
    (without(HF4, "rms_norm_eps"), {}, "rms_norm_eps is missing: 1e-05 is used"),
    (without(HF4, "max_position_embeddings"), {}, "max_position_embeddings is missing: 131072 is used"),
    (without(HF4, "rope_theta"), {}, "rope_theta is missing: 150000.0 is used"),
    (without(HF4, "model_type"), {}, "model_type is missing: 'gpt_oss' is used, based on architectures"),
    (
        {**HF4, "hidden_act": "gelu"},
        {},
        "hidden_act is 'gelu': ignored, gpt-oss always uses its clamped SwiGLU",
    ),
    (
        {**HF4, "head_dim": None, "num_attention_heads": 40},
        {"head_dim": 72, "num_attention_heads": 40},
        "head_dim is null: hidden_size / num_attention_heads = 72 is used",
    ),
    (
        {**HF4, "num_key_value_heads": None},
        {"num_key_value_heads": 64},
        "num_key_value_heads is null: 64 is used, one per query head",
    ),
    (
        {**HF4, "num_hidden_layer": 3, "zzz": 1},
        {},
        "unknown fields are ignored: num_hidden_layer (did you mean num_hidden_layers?), zzz",
    ),
    (
        {**ORIGINAL, "num_expert": 3},
        {},
        "unknown fields are ignored: num_expert (did you mean num_experts?)",
    ),
    (
        with_rope(facto=3),
        {},
        "unknown fields are ignored: rope_scaling.facto (did you mean factor?)",
    ),
    (
        {**HF4, "initial_context_length": 2048},
        {},
        "initial_context_length is 2048, but rope_scaling.original_max_position_embeddings is 4096: "
        "4096 is used",
    ),
    (
        {**HF4, "rope_parameters": {**YARN, "factor": 16.0}},
        {},
        "rope_parameters.factor is 16.0, but rope_scaling.factor is 32.0: 32.0 is used",
    ),
    (
        {**HF4, "rope_parameters": {"rope_type": "default"}},
        {},
        "rope_parameters.rope_type is 'default', but rope_scaling.rope_type is 'yarn': 'yarn' is used",
    ),
    (
        {**HF4, "rope_parameters": {**YARN, "rope_theta": 10000.0}},
        {},
        "rope_parameters.rope_theta is 10000.0, but rope_theta is 150000: 150000 is used",
    ),
    (
        {**HF4, "rope_scaling": None},
        {"rope_scaling": None},
        "rope_scaling is null or empty: plain rotary embedding is used, without YaRN",
    ),
    (
        {**HF4, "rope_scaling": {"rope_type": "default", "factor": 32.0}},
        {"rope_scaling": None},
        "rope_scaling.rope_type is 'default': ignoring rope_scaling.factor",
    ),
    (
        {**HF4, "rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": None},
        "rope_scaling.type is 'linear': ignoring rope_scaling.factor",
    ),
    (
        {**HF4, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_scaling": None},
        "rope_scaling.type is 'dynamic': plain rotary embedding is used, which it equals up to "
        "max_position_embeddings (131072)",
    ),
    (
        with_rope(factor=None),
        {},
        "rope_scaling.factor is null: 32.0 is used, "
        "max_position_embeddings / original_max_position_embeddings",
    ),
]


@pytest.mark.parametrize(
    ("values", "fields", "message"), UNCLEAR, ids=[str(case[2])[:50] for case in UNCLEAR]
)
def test_a_file_with_one_clear_meaning_is_read_with_a_warning(values, fields, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.warns(UserWarning) as caught:
        assert ModelConfig.from_hf(path) == dataclasses.replace(ModelConfig(), **fields)
    assert [str(one.message) for one in caught] == [f"{path}: {message}"]


def test_fields_of_every_transformers_model_give_no_warning():
    extra = {"_name_or_path": "x", "bos_token_id": 1, "torch_dtype": "bfloat16", "auto_map": {}, "top_k": 5}
    assert ModelConfig.from_hf({**HF4, **extra, "attn_implementation": "eager"}) == ModelConfig()


# Errors.

BAD = [
    (
        {**without(HF4, "num_hidden_layers"), "num_hidden_layer": 3},
        "num_hidden_layers is missing: every gpt-oss config.json has it; the file has num_hidden_layer",
    ),
    (
        {**without(ORIGINAL, "num_experts"), "num_expert": 3},
        "num_experts is missing: every gpt-oss config.json has it; the file has num_expert",
    ),
    ({**HF4, "per_layer_config": {"0": {}}}, "per_layer_config is {'0': {}}: must be left out"),
    ({**HF4, "num_experts": 64}, "num_experts is 64, but num_local_experts is 32: they mean the same"),
    (
        {**HF4, "original_max_position_embeddings": 2048},
        "original_max_position_embeddings is 2048, but rope_scaling.original_max_position_embeddings is 4096",
    ),
    (
        {**HF4, "rope_scaling": without(YARN, "original_max_position_embeddings")},
        "initial_context_length is 4096, but max_position_embeddings "
        "(used because rope_scaling.original_max_position_embeddings is missing) is 131072: ",
    ),
    (
        {**HF4, "rope_scaling": None, "rope_parameters": YARN},
        "rope_scaling is None: must agree with rope_para",
    ),
    (
        {**without(HF4, "rope_scaling"), "rope_parameters": {**YARN, "rope_theta": 10000.0}},
        "rope_parameters.rope_theta is 10000.0, but rope_theta is 150000: they mean the same",
    ),
    (
        {**HF4, "rope_scaling": {"full_attention": YARN, "sliding_attention": YARN}},
        "rope_scaling.rope_type is missing: must be 'yarn', or 'default' for plain",
    ),
    (with_rope(type="default"), "rope_scaling.type is 'default', but rope_scaling.rope_type is 'yarn': "),
    (
        with_rope(rope_type="llama3"),
        "rope_scaling.rope_type is 'llama3': must be 'yarn', or 'default' for plain",
    ),
    (
        {**HF4, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "rope_scaling.type is 'linear': must be 'yarn', or 'default' for plain rotary embedding; no other "
        "scaling is supported",
    ),
    (
        {**HF4, "rope_scaling": without(YARN, "rope_type")},
        "rope_scaling.rope_type is missing: must be 'yarn'",
    ),
    ({**HF4, "rope_scaling": without(YARN, "factor")}, "rope_scaling.factor is missing: "),
    ({**HF4, "rope_scaling": 32.0}, "rope_scaling is 32.0: must be an object or null"),
    (with_rope(factor="32"), "rope_scaling.factor is '32': must be a finite number"),
    (with_rope(factor=0.5), "model.rope_scaling.factor is 0.5: must be 1 or more"),
    (with_rope(truncate=None), "model.rope_scaling.truncate is None: must be True or False"),
    (
        with_rope(attention_factor=1.0),
        "rope_scaling.attention_factor is 1.0: must be 0.1 ln(factor) + 1 = 1.3465",
    ),
    (
        with_rope(mscale=1.0, mscale_all_dim=1.0),
        "rope_scaling.mscale is 1.0: is not supported with mscale_all_dim (1.0); leave both out",
    ),
    (with_rope(partial_rotary_factor=0.5), "rope_scaling.partial_rotary_factor is 0.5: must be 1"),
    ({**HF4, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: must be 1"),
    (
        without(HF4, "rope_scaling"),
        "rope_parameters is missing: every gpt-oss config.json has it, or rope_scaling",
    ),
    *[
        (without(HF4, name), f"{name} is missing: every gpt-oss config.json has it")
        for name in ("vocab_size", "head_dim", "num_local_experts", "num_hidden_layers")
    ],
    *[
        (without(ORIGINAL, name), f"{name} is missing: every gpt-oss config.json has it")
        for name in ("num_experts", "rope_scaling_factor", "rope_ntk_alpha", "rope_theta", "head_dim")
    ],
    ({**ORIGINAL, "rope_scaling_factor": "3"}, "rope_scaling_factor is '3': must be a finite number"),
    ({**ORIGINAL, "rope_scaling_factor": 0.5}, "model.rope_scaling.factor is 0.5: must be 1 or more"),
    (without(HF4, "model_type", "architectures"), "model_type is missing: must be 'gpt_oss'"),
    ({**HF4, "model_type": "llama"}, "model_type is 'llama': must be 'gpt_oss'"),
    ({"model": {}, "data": {}, "steps": 3}, "the config.json of a run folder, which TrainConfig.load reads"),
    ({}, "model_type is missing"),
    (
        {**HF4, "head_dim": None, "hidden_size": 2881},
        "model.head_dim is None: must be an integer",
    ),
    (
        {**HF4, "quantization_config": {"quant_method": "gptq"}},
        "quantization_config.quant_method is 'gptq': must be 'mxfp4'",
    ),
    ({**HF4, "quantization_config": "mxfp4"}, "quantization_config is 'mxfp4': must be an object or null"),
    (
        {**HF4, "layer_types": ["sliding_attention", "full_attention"]},
        "must name a type for each of model.num_hidden_layers (24)",
    ),
    ({**HF4, "layer_types": []}, "must name a type for each of model.num_hidden_layers (24)"),
    (
        {**HF4, "num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]},
        "may contain only 'sliding_attention' and 'full_attention'",
    ),
    ({**HF4, "swiglu_limit": None}, "swiglu_limit is None: must be a finite number"),
    ({**HF4, "sliding_window": None}, "model.sliding_window is None: must be an integer"),
    ({**HF4, "output_router_logits": 1}, "output_router_logits is 1: must be True or False"),
    ({**HF4, "hidden_size": 2880.0}, "model.hidden_size is 2880.0: must be an integer"),
    ({**HF4, "num_attention_heads": 7}, "model.num_attention_heads is 7: must be a multiple of "),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_errors_name_file_field_and_value(values, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf(values)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    for source in (tmp_path, path):
        with pytest.raises(ValueError) as from_file:
            ModelConfig.from_hf(source)
        assert str(from_file.value) == f"{path}: {caught.value}"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"gone/config\.json: no such file$"):
        ModelConfig.from_hf(tmp_path / "gone" / "config.json")
    with pytest.raises(ValueError, match="this folder has neither config.json nor original/config.json"):
        ModelConfig.from_hf(tmp_path)
    path = tmp_path / "config.json"
    for content, message in [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[1]", "must contain a JSON object"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            ModelConfig.from_hf(tmp_path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


# Writing.


def test_written_config():
    assert written(dataclasses.replace(HF5_READ, sliding_window=5)) == {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.125,
        "dtype": "bfloat16",
        "experts_per_token": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 24,
        "initial_context_length": 24,
        "initializer_range": 0.3,
        "intermediate_size": 40,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "max_position_embeddings": 192,
        "model_type": "gpt_oss",
        "num_attention_heads": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 2.0,
            "beta_slow": 0.25,
            "truncate": True,
            "original_max_position_embeddings": 24,
            "rope_theta": 1000.0,
        },
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 2.0,
            "beta_slow": 0.25,
            "truncate": True,
            "original_max_position_embeddings": 24,
        },
        "rope_theta": 1000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": 5,
        "swiglu_alpha": 1.5,
        "swiglu_limit": 6.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 97,
    }


def test_the_format_of_the_weights_is_written():
    assert written(ModelConfig(), "float32")["dtype"] == "float32"
    assert written(ModelConfig(), "float32")["torch_dtype"] == "float32"
    values = written(ModelConfig(), "mxfp4")
    assert values.pop("quantization_config") == {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }
    assert values == written(ModelConfig(), "bfloat16")
    with pytest.raises(ValueError, match="experts is 'fp8': must be one of 'bfloat16', 'float32', 'mxfp4'"):
        ModelConfig().to_hf("fp8")


def test_plain_rope_is_written_as_a_null():
    values = written(ModelConfig(rope_scaling=None, rope_theta=10000, max_position_embeddings=555))
    assert values["rope_scaling"] is None and values["rope_theta"] == 10000.0
    assert values["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert values["initial_context_length"] == 555


def test_missing_biases_and_sinks_do_not_change_the_config():
    bare = ModelConfig(expert_bias=False, router_bias=False, learned_sinks=False, residual_dropout=0.1)
    assert bare.to_hf() == ModelConfig().to_hf()


def test_all_inexpressible_fields_are_reported_together():
    config = ModelConfig(
        hidden_size=100, intermediate_size=68, sink_tokens=4, swiglu_up_offset=0.0, swiglu_limit=None
    )
    with pytest.raises(ValueError) as caught:
        config.to_hf("mxfp4")
    assert str(caught.value) == (
        "this model cannot be written in the published format: sink_tokens is 4, but the format requires 0; "
        "swiglu_up_offset is 0.0, but the format implies 1; swiglu_limit is None, but the format requires a "
        "number (one far above all activations, such as 1e4, is equivalent); hidden_size is 100, but MXFP4 "
        "requires a multiple of 32 (experts='bfloat16' allows any size); intermediate_size is 68, but MXFP4 "
        "requires a multiple of 32 (experts='bfloat16' allows any size). A run folder, which this project "
        "reads, stores it unchanged"
    )
    with pytest.raises(ValueError) as caught:
        config.to_hf()
    assert "MXFP4" not in str(caught.value) and "sink_tokens is 4" in str(caught.value)
    dataclasses.replace(config, sink_tokens=0, swiglu_up_offset=1.0, swiglu_limit=1e4).to_hf()


# Round trips.

FLOATS = st.floats(1e-3, 1e4)
SIZES = st.integers(1, 5000)


@st.composite
def configs(draw) -> ModelConfig:
    """Models that the format can express. Alternating layer types are None, as they are read."""
    layers, heads, experts = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kinds = draw(st.none() | st.lists(st.sampled_from([SLIDING, FULL]), min_size=layers, max_size=layers))
    if kinds is not None and kinds == [(SLIDING, FULL)[i % 2] for i in range(layers)]:
        kinds = None
    slow = draw(st.floats(0.01, 10))
    scaling = RopeScaling(
        draw(st.floats(1, 100)), slow + draw(st.floats(0.01, 50)), slow, draw(st.booleans()), draw(SIZES)
    )
    return ModelConfig(
        vocab_size=draw(SIZES),
        hidden_size=draw(SIZES),
        intermediate_size=draw(SIZES),
        num_hidden_layers=layers,
        num_attention_heads=heads * draw(st.integers(1, 9)),
        num_key_value_heads=heads,
        head_dim=2 * draw(SIZES),
        num_local_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        sliding_window=draw(SIZES),
        layer_types=None if kinds is None else tuple(kinds),
        max_position_embeddings=draw(SIZES),
        rope_theta=draw(st.integers(2, 10**6) | st.floats(2, 1e6)),
        rope_scaling=draw(st.sampled_from([None, scaling])),
        attention_bias=draw(st.booleans()),
        swiglu_alpha=draw(FLOATS | st.integers(1, 3)),
        swiglu_limit=draw(FLOATS | st.integers(1, 9)),
        tie_word_embeddings=draw(st.booleans()),
        attention_dropout=draw(st.floats(0, 0.9)),
        rms_norm_eps=draw(FLOATS),
        initializer_range=draw(FLOATS),
        # The file does not contain these.
        residual_dropout=draw(st.sampled_from([0.0, 0.1])),
        router_aux_loss_coef=draw(st.sampled_from([0.0, 0.01])),
        router_z_loss_coef=draw(st.sampled_from([0.0, 0.01])),
        remat=draw(st.sampled_from(["none", "dots"])),
    )


def carried(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        config, residual_dropout=0.0, router_aux_loss_coef=0.0, router_z_loss_coef=0.0, remat="none"
    )


@settings(max_examples=200, deadline=None)
@given(configs(), st.sampled_from(["bfloat16", "float32"]))
def test_write_and_read(config, experts):
    assert ModelConfig.from_hf(written(config, experts)) == carried(config)


# Against transformers.

LIVE = [
    ModelConfig(),
    HF5_READ,
    dataclasses.replace(HF5_READ, rope_scaling=None, layer_types=None, attention_bias=True, swiglu_limit=9),
]


@pytest.mark.parity
@pytest.mark.parametrize("config", LIVE)
@pytest.mark.parametrize("experts", ["bfloat16", "float32"])
def test_transformers_reads_a_written_config(config, experts, tmp_path):
    transformers = pytest.importorskip("transformers")
    values = written(config, experts)
    (tmp_path / "config.json").write_text(json.dumps(values))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(read) is transformers.GptOssConfig
    theirs = read.to_dict()
    if "rope_parameters" in theirs and "rope_theta" not in theirs:
        # transformers 5 no longer has the old names.
        values = without(values, "rope_scaling", "rope_theta", "torch_dtype")
    assert {name: theirs[name] for name in values} == values


@pytest.mark.parity
@pytest.mark.parametrize("config", LIVE)
def test_a_config_written_by_transformers_is_read(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "sliding_window",
        "max_position_embeddings", "attention_bias", "tie_word_embeddings", "attention_dropout",
        "rms_norm_eps", "initializer_range", "swiglu_alpha",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in names}
    rope = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": "yarn", **dataclasses.asdict(config.rope_scaling)}
    theirs = transformers.GptOssConfig(
        **values,
        swiglu_limit=float(config.swiglu_limit),
        layer_types=list(config.resolved_layer_types),
        rope_parameters={**rope, "rope_theta": config.rope_theta},
        rope_scaling=None if config.rope_scaling is None else dict(rope),
        rope_theta=config.rope_theta,
    )
    theirs.save_pretrained(tmp_path)
    assert ModelConfig.from_hf(tmp_path) == carried(config)
    assert ModelConfig.from_hf(json.loads(theirs.to_json_string(use_diff=False))) == carried(config)


@pytest.mark.parity
def test_transformers_default_is_the_large_model():
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.from_hf(json.loads(transformers.GptOssConfig().to_json_string(use_diff=False)))
    large = ModelConfig(num_hidden_layers=36, num_local_experts=128)
    if int(transformers.__version__.split(".")[0]) < 5:
        # 4.55 omits the original length from its default, and then uses the maximum length.
        scaling = dataclasses.replace(large.rope_scaling, original_max_position_embeddings=131072)
        large = dataclasses.replace(large, rope_scaling=scaling)
    assert config == large
