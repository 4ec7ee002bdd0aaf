"""Settings: bad ones are errors that name the field, the value and what is allowed; JSON; flags."""

import dataclasses
import json
import math
import pathlib
import typing

import pytest

from gptoss_jax.config import (
    FULL,
    SLIDING,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RopeScaling,
    TrainConfig,
)
from gptoss_jax.config.base import FORMER_NAMES, listed, one_line
from gptoss_jax.config.preset import OPTIONAL_SECTIONS, TUPLES, read_preset

BAD = [
    *[
        (ModelConfig, {name: value}, f"model.{name} is {value!r}: must be above 0")
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "sliding_window",
            "max_position_embeddings", "rope_theta", "swiglu_alpha", "rms_norm_eps", "initializer_range",
        )
        for value in (0, -3)
    ],
    (
        ModelConfig,
        {"num_attention_heads": 7},
        "model.num_attention_heads is 7: must be a multiple of model.num_key_value_heads (8)",
    ),
    (ModelConfig, {"head_dim": 7}, "model.head_dim is 7: must be even, because RoPE rotates pairs"),
    (
        ModelConfig,
        {"num_experts_per_tok": 33},
        "model.num_experts_per_tok is 33: must be at most model.num_local_experts (32)",
    ),
    (
        ModelConfig,
        {"attention_dropout": 1.0},
        "model.attention_dropout is 1.0: must be at least 0 and below 1",
    ),
    (
        ModelConfig,
        {"residual_dropout": -0.1},
        "model.residual_dropout is -0.1: must be at least 0 and below 1",
    ),
    (ModelConfig, {"sink_tokens": -1}, "model.sink_tokens is -1: must be 0 or more"),
    (ModelConfig, {"router_aux_loss_coef": -0.5}, "model.router_aux_loss_coef is -0.5: must be 0 or more"),
    (ModelConfig, {"router_z_loss_coef": -0.5}, "model.router_z_loss_coef is -0.5: must be 0 or more"),
    (ModelConfig, {"swiglu_limit": 0.0}, "model.swiglu_limit is 0.0: must be above 0, or None"),
    (
        ModelConfig,
        {"num_hidden_layers": 3, "layer_types": (FULL, SLIDING)},
        "model.layer_types is ('full_attention', 'sliding_attention'): "
        "must name a type for each of model.num_hidden_layers (3)",
    ),
    (
        ModelConfig,
        {"num_hidden_layers": 2, "layer_types": (FULL, "windowed")},
        "model.layer_types is ('full_attention', 'windowed'): "
        "may contain only 'sliding_attention' and 'full_attention'",
    ),
    (
        ModelConfig,
        {"compute_dtype": "float16"},
        "model.compute_dtype is 'float16': must be 'auto' or 'bfloat16' or 'float32'",
    ),
    (ModelConfig, {"remat": True}, "model.remat is True: must be 'none' or 'dots' or 'block'"),
    (
        ModelConfig,
        {"expert_format": "int4"},
        "model.expert_format is 'int4': must be 'plain' or 'mxfp4'",
    ),
    *[
        (
            ModelConfig,
            {"expert_format": "mxfp4", name: 80},
            f"model.{name} is 80: must be a multiple of 32 if model.expert_format is 'mxfp4', "
            "because 32 weights along this dimension share a scale",
        )
        for name in ("hidden_size", "intermediate_size")
    ],
    (ModelConfig, {"hidden_size": 64.0}, "model.hidden_size is 64.0: must be an integer"),
    (ModelConfig, {"hidden_size": "64"}, "model.hidden_size is '64': must be an integer"),
    (ModelConfig, {"hidden_size": True}, "model.hidden_size is True: must be an integer"),
    (ModelConfig, {"attention_bias": 1}, "model.attention_bias is 1: must be True or False"),
    (ModelConfig, {"rope_theta": math.inf}, "model.rope_theta is inf: must be a finite number"),
    (ModelConfig, {"swiglu_limit": math.nan}, "model.swiglu_limit is nan: must be a finite number or None"),
    (ModelConfig, {"rope_scaling": 32.0}, "model.rope_scaling is 32.0: must be RopeScaling or None"),
    (RopeScaling, {"factor": 0.5}, "model.rope_scaling.factor is 0.5: must be 1 or more"),
    (
        RopeScaling,
        {"beta_fast": 1.0},
        "model.rope_scaling.beta_fast is 1.0: must be above beta_slow (1.0)",
    ),
    (
        RopeScaling,
        {"original_max_position_embeddings": 0},
        "model.rope_scaling.original_max_position_embeddings is 0: must be above 0",
    ),
    (ModelConfig, {"lora": 8}, "model.lora is 8: must be LoraConfig or None"),
    (LoraConfig, {"rank": 0}, "model.lora.rank is 0: must be above 0"),
    (LoraConfig, {"expert_rank": 0}, "model.lora.expert_rank is 0: must be above 0, or None"),
    (LoraConfig, {"alpha": -1.0}, "model.lora.alpha is -1.0: must be above 0"),
    (
        LoraConfig,
        {"targets": ()},
        "model.lora.targets is (): must name at least one of q, k, v, out, gate_up, down, router, head",
    ),
    (
        LoraConfig,
        {"targets": ("q", "gate_ups")},
        "model.lora.targets is 'gate_ups': matches nothing (did you mean gate_up?); "
        "the targets are q, k, v, out, gate_up, down, router, head",
    ),
    (LoraConfig, {"targets": ("q", "q")}, "model.lora.targets is ('q', 'q'): must name each target once"),
    (
        ModelConfig,
        {"lora": LoraConfig(targets=("q", "head")), "tie_word_embeddings": True},
        "model.lora.targets is 'head': matches nothing, because model.tie_word_embeddings leaves the model "
        "without a head",
    ),
    (DataConfig, {"seq_len": 1}, "data.seq_len is 1: must be 2 or more"),
    (DataConfig, {"batch_size": 0}, "data.batch_size is 0: must be above 0"),
    (DataConfig, {"val_fraction": 0.6}, "data.val_fraction is 0.6: must be above 0 and at most 0.5"),
    (DataConfig, {"source": None}, "data.source is None: must be text"),
    (OptimConfig, {"learning_rate": 0}, "optim.learning_rate is 0: must be above 0"),
    (OptimConfig, {"epsilon": 0.0}, "optim.epsilon is 0.0: must be above 0"),
    (OptimConfig, {"grad_accum_steps": 0}, "optim.grad_accum_steps is 0: must be above 0"),
    (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps is -1: must be 0 or more"),
    (OptimConfig, {"weight_decay": -1.0}, "optim.weight_decay is -1.0: must be 0 or more"),
    (OptimConfig, {"max_grad_norm": -1.0}, "optim.max_grad_norm is -1.0: must be 0 or more"),
    (OptimConfig, {"beta1": 1.0}, "optim.beta1 is 1.0: must be at least 0 and below 1"),
    (OptimConfig, {"beta2": -0.1}, "optim.beta2 is -0.1: must be at least 0 and below 1"),
    (OptimConfig, {"decay_fraction": 0.0}, "optim.decay_fraction is 0.0: must be above 0 and at most 1"),
    (OptimConfig, {"min_lr_ratio": 1.5}, "optim.min_lr_ratio is 1.5: must be between 0 and 1"),
    (OptimConfig, {"schedule": "x"}, "optim.schedule is 'x': must be 'cosine' or 'wsd' or 'constant'"),
    (MeshConfig, {"tensor": 0}, "mesh.tensor is 0: must be above 0, or -1 for all remaining devices"),
    (MeshConfig, {"expert": -1}, "mesh.expert is -1: only one axis can be -1, and mesh.data already is"),
    (CheckpointConfig, {"every": 0}, "checkpoint.every is 0: must be above 0"),
    (CheckpointConfig, {"keep": 0}, "checkpoint.keep is 0: must be above 0"),
    (EvalConfig, {"every": 0}, "eval.every is 0: must be above 0"),
    (EvalConfig, {"batches": 0}, "eval.batches is 0: must be above 0"),
    (EvalConfig, {"sample_tokens": -1}, "eval.sample_tokens is -1: must be 0 or more"),
    (EvalConfig, {"temperature": -0.1}, "eval.temperature is -0.1: must be 0 or more"),
    (TrainConfig, {"steps": 0}, "steps is 0: must be above 0"),
    (TrainConfig, {"log_every": 0}, "log_every is 0: must be above 0"),
    (TrainConfig, {"seed": -1}, "seed is -1: must be 0 or more"),
    (TrainConfig, {"run_dir": " "}, "run_dir is ' ': must be the name of a folder"),
    (TrainConfig, {"model": None}, "model is None: must be ModelConfig"),
    (
        TrainConfig,
        {"model": ModelConfig(expert_format="mxfp4")},
        "model.expert_format is 'mxfp4': must be 'plain' for full training, because MXFP4 is too coarse for "
        "optimizer updates; with 'mxfp4', train adapters (model.lora)",
    ),
    (
        TrainConfig,
        {"model": ModelConfig(lora=LoraConfig(rank=513))},
        "model.lora.rank is 513: the rank of k, 513, must be at most 512, "
        "the smaller dimension of 2880 x 512",
    ),
    (
        TrainConfig,
        {"model": ModelConfig(intermediate_size=32, lora=LoraConfig(rank=264, targets=("q", "gate_up")))},
        "model.lora.rank is 264: the rank of gate_up, 66, must be at most 64, "
        "the smaller dimension of 2880 x 64",
    ),
    (
        TrainConfig,
        {"model": ModelConfig(intermediate_size=8, lora=LoraConfig(expert_rank=9))},
        "model.lora.expert_rank is 9: the rank of down, 9, must be at most 8, "
        "the smaller dimension of 8 x 2880",
    ),
    (
        TrainConfig,
        {"optim": OptimConfig(grad_accum_steps=3)},
        "optim.grad_accum_steps is 3: must divide data.batch_size (16)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "values", "message"), BAD)
def test_errors_name_the_field_the_value_and_what_is_allowed(cls, values, message):
    with pytest.raises(ValueError) as caught:
        cls(**values)
    assert str(caught.value) == message


def test_errors_of_layer_types_name_the_field():
    with pytest.raises(ValueError, match=r"^model\.layer_types is \(1, 2\): must be "):
        ModelConfig(num_hidden_layers=2, layer_types=(1, 2))


def test_integers_are_valid_floats():
    assert ModelConfig(rope_theta=10000).rope_theta == 10000


def test_round_trip_through_json():
    config = TrainConfig(
        model=ModelConfig(
            num_hidden_layers=3,
            layer_types=(FULL, SLIDING, SLIDING),
            rope_scaling=RopeScaling(factor=4.0, truncate=True),
            swiglu_limit=None,
        ),
        optim=OptimConfig(schedule="wsd", beta2=0.99),
        mesh=MeshConfig(data=2, tensor=3),
        steps=77,
        init_from="runs/other",
    )
    values = json.loads(json.dumps(config.to_dict()))
    assert values["model"]["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert values["model"]["rope_scaling"]["factor"] == 4.0
    assert values["mesh"] == {
        "data": 2, "fsdp": 1, "context": 1, "expert": 1, "tensor": 3, "dcn_data": 1, "dcn_fsdp": 1,
    }  # fmt: skip
    assert TrainConfig.from_dict(values) == config


def test_packed_experts_round_trip():
    config = ModelConfig(hidden_size=96, intermediate_size=64, expert_format="mxfp4")
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig().expert_format == "plain"


def test_adapters_round_trip_and_may_be_trained_beside_packed_experts():
    lora = LoraConfig(rank=4, expert_rank=3, rslora=True, targets=("v", "down"))
    config = TrainConfig(model=ModelConfig(expert_format="mxfp4", lora=lora))
    values = json.loads(json.dumps(config.to_dict()))
    assert values["model"]["lora"]["targets"] == ["v", "down"]
    assert TrainConfig.from_dict(values) == config
    del values["model"]["lora"], values["model"]["expert_format"]
    assert TrainConfig.from_dict(values).model.lora is None


def test_a_model_with_adapters_has_no_published_config():
    with pytest.raises(ValueError) as caught:
        ModelConfig(lora=LoraConfig()).to_hf()
    assert str(caught.value).startswith("model.lora is {'rank': 8, ")
    assert str(caught.value).endswith(": merge them into the weights, or export the adapter")


def test_round_trip_without_rope_scaling():
    config = ModelConfig(rope_scaling=None)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_from_dict_keeps_defaults():
    assert TrainConfig.from_dict({"optim": {"beta1": 0.8}}) == TrainConfig(optim=OptimConfig(beta1=0.8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model": {"num_hidden_layer": 3}},
            "model.num_hidden_layer: unknown field; did you mean num_hidden_layers?",
        ),
        ({"stepz": 3}, "stepz: unknown field; did you mean steps?"),
        (
            {"model": {"rope_scaling": {"facto": 3.0}}},
            "model.rope_scaling.facto: unknown field; did you mean factor?",
        ),
        (
            {"mesh": {"zzz": 1}},
            "mesh.zzz: unknown field; known: data, fsdp, context, expert, tensor, dcn_data, dcn_fsdp",
        ),
        ({"model": 5}, "model is 5: must be ModelConfig"),
        ({"model": {"vocab_size": "many"}}, "model.vocab_size is 'many': must be an integer"),
        ({"model": {"vocab_size": {"a": 1}}}, "model.vocab_size is {'a': 1}: must be an integer"),
        ({"data": {"seq_len": [3]}}, "data.seq_len is (3,): must be an integer"),
    ],
)
def test_from_dict_rejects_bad_values(values, message):
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_dict(values)
    assert str(caught.value) == message


def test_save_and_load(tmp_path):
    config = TrainConfig(steps=9, model=ModelConfig(head_dim=32))
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config
    with pytest.raises(ValueError, match=r"missing\.json: no such file"):
        TrainConfig.load(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json: not JSON"):
        TrainConfig.load(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json: must contain a JSON object"):
        TrainConfig.load(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("layers", "layer_types", "period"),
    [
        (4, None, (SLIDING, FULL)),
        (1, None, (SLIDING,)),
        (5, None, (SLIDING, FULL, SLIDING, FULL, SLIDING)),
        (6, (SLIDING, SLIDING, FULL) * 2, (SLIDING, SLIDING, FULL)),
        (4, (FULL,) * 4, (FULL,)),
        (4, (SLIDING, FULL, FULL, SLIDING), (SLIDING, FULL, FULL, SLIDING)),
    ],
)
def test_period_of_layer_types(layers, layer_types, period):
    config = ModelConfig(num_hidden_layers=layers, layer_types=layer_types)
    assert config.period == period
    assert len(config.resolved_layer_types) == layers
    assert config.resolved_layer_types == period * (layers // len(period))


def test_the_first_layer_is_sliding_by_default():
    assert ModelConfig(num_hidden_layers=3).resolved_layer_types == (SLIDING, FULL, SLIDING)


def test_configs_are_frozen_and_hashable():
    config = ModelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.head_dim = 3
    assert hash(config) == hash(ModelConfig()) and config in {ModelConfig()}


@pytest.fixture
def preset(tmp_path):
    """Writes a preset whose model has these settings; returns its path."""

    def write(**model) -> str:
        model = {"num_hidden_layers": 1} | model
        path = tmp_path / "preset.py"
        path.write_text(
            f"from gptoss_jax.config import *\nconfig = TrainConfig(model=ModelConfig(**{model!r}))"
        )
        return str(path)

    return write


def fields_of(cls=TrainConfig, path=()):
    """Yields the path, types and section of every field."""
    for name, kind in typing.get_type_hints(cls).items():
        kinds = (kind, *typing.get_args(kind))
        section = next(filter(dataclasses.is_dataclass, kinds), None)
        yield (*path, name), kinds, section
        if section:
            yield from fields_of(section, (*path, name))


def value_at(config, path):
    for name in path:
        config = getattr(config, name)
    return config


def test_every_optional_value_can_be_set_and_be_none_on_the_command_line(preset):
    found = {
        path: kinds[1] for path, kinds, section in fields_of() if type(None) in kinds and section is None
    }
    assert {("init_from",), ("model", "layer_types"), ("model", "swiglu_limit")} <= found.keys()
    values = {float: ("2.5", 2.5), int: ("3", 3), str: ("x", "x"), tuple[str, ...]: (FULL, (FULL,))}
    for path, kind in found.items():
        flag, (word, value) = "--" + ".".join(path).replace("_", "-"), values[kind]
        # A text with a form of its own.
        word, value = ("2:3", "2:3") if path == ("profile",) else (word, value)
        assert value_at(read_preset(preset(), [flag, "None"]), path) is None
        # `init_adapter` needs adapters, and `dpo.gamma` its loss.
        needed = ["--model.lora.rank", "8", "--dpo.loss", "simpo"]
        assert value_at(read_preset(preset(), [flag, word, *needed]), path) == value
    assert read_preset(preset(layer_types=(FULL,)), ["--model.layer-types", "None"]).model.layer_types is None


@pytest.mark.parametrize("section", OPTIONAL_SECTIONS)
def test_optional_sections_can_be_switched_off_and_on_on_the_command_line(preset, section):
    found = {
        ".".join(path): section for path, kinds, section in fields_of() if section and type(None) in kinds
    }
    assert found == OPTIONAL_SECTIONS
    path, cls, flag = section.split("."), found[section], f"--{section}".replace("_", "-")
    assert value_at(read_preset(preset(), [flag, "None"]), path) is None
    off = preset(**{path[-1]: None})
    assert value_at(read_preset(off), path) is None
    assert value_at(read_preset(off, [f"{flag}=None", "--steps", "3"]), path) is None
    for field in dataclasses.fields(cls):
        words = field.default if isinstance(field.default, tuple) else [str(field.default)]
        config = read_preset(off, [f"{flag}.{field.name}", *words, "--steps", "3"])
        assert value_at(config, path) == cls() and config.steps == 3


@pytest.mark.parametrize("given", [{"rope_scaling": None, "lora": None}, {}])
def test_a_flag_of_a_field_switches_its_section_on(preset, given):
    config = read_preset(preset(**given), ["--model.rope_scaling.factor", "4", "--model.lora.rank", "6"])
    assert config.model.rope_scaling == RopeScaling(factor=4.0)
    assert config.model.lora == LoraConfig(rank=6)


def test_fields_with_several_values():
    found = [
        path for path, kinds, _ in fields_of() if any(typing.get_origin(kind) is tuple for kind in kinds)
    ]
    assert [".".join(path) for path in found] == [*TUPLES]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model.rope-scaling", "yarn"],
            "model.rope_scaling is 'yarn': "
            "must be None; a flag such as --model.rope-scaling.factor switches it on",
        ),
        (["--model.rope-scaling"], "model.rope_scaling is '': must be None, or left out"),
        (
            ["--model.rope-scaling", "None", "--model.rope-scaling.factor=4"],
            "model.rope_scaling is None: leave out --model.rope-scaling.factor, which switches it on",
        ),
    ],
)
def test_contradictory_flags_are_rejected(preset, flags, message):
    with pytest.raises(ValueError) as caught:
        read_preset(preset(), flags)
    assert str(caught.value) == message


@pytest.mark.parametrize(("former", "name"), FORMER_NAMES.items())
def test_old_names_are_read_from_json_and_rejected_elsewhere(former, name, tmp_path):
    (section, old), new = former.split("."), name.split(".")
    value = 2 if new[1] == "grad_accum_steps" else 0.5
    assert value_at(TrainConfig.from_dict({section: {old: value}}), new) == value
    path = tmp_path / "preset.py"
    path.write_text(
        "import dataclasses\nfrom gptoss_jax.config import TrainConfig\nconfig = TrainConfig()\n"
        f"dataclasses.replace(config.{section}, {new[1]}={value})"
    )
    flag = f"--{former}".replace("_", "-")
    with pytest.raises(ValueError) as caught:
        read_preset(path, [flag, str(value)])
    assert str(caught.value) == f"{flag}: renamed to --{name.replace('_', '-')}"
    path.write_text(path.read_text().replace(new[1], old))
    with pytest.raises(ValueError) as caught:
        read_preset(path)
    assert str(caught.value) == f"{path}: {former} was renamed to {name}"


def test_help_shows_the_fields_of_sections_that_are_off(preset, capsys):
    with pytest.raises(SystemExit):
        read_preset(preset(rope_scaling=None), ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--model.rope-scaling.beta-fast" in shown
    assert "--model.rope-scaling and --model.lora are optional sections" in shown
    assert "--model.lora.rank" in shown
    assert "Off in this preset: --model.rope-scaling, --model.lora." in shown


def test_helpers_of_error_messages():
    assert listed([]) == ""
    assert listed("abcd") == "a, b, c, d"
    assert listed({"a": 1, "b": 2, "c": 3}, limit=2) == "a, b and 1 more"
    assert listed(map(str, range(2001)), limit=1) == "0 and 2,000 more"
    assert one_line(ValueError("two\n  lines\t")) == "two lines"
    assert one_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("name", "lora", "experts", "layers"),
    [
        ("quickstart_sft", False, "plain", 4),
        ("quickstart_dpo", True, "plain", 4),
        ("dpo_qlora_20b", True, "mxfp4", 24),
        ("quickstart_grpo", True, "plain", 4),
        ("grpo_qlora_20b", True, "mxfp4", 24),
        ("qat_full_20b", False, "plain", 24),
        ("sft_full_20b", False, "plain", 24),
        ("sft_lora_20b", True, "plain", 24),
        ("sft_qlora_20b", True, "mxfp4", 24),
        ("sft_qlora_120b", True, "mxfp4", 36),
    ],
)
def test_presets_for_fine_tuning(name, lora, experts, layers):
    config = read_preset(pathlib.Path(__file__).parents[1] / "configs" / "finetune" / f"{name}.py")
    model = config.model
    assert (model.lora is not None, model.expert_format, model.num_hidden_layers) == (lora, experts, layers)
    # The published coefficient of 0.9 would outweigh the loss.
    assert model.router_aux_loss_coef == model.router_z_loss_coef == 0
    assert config.init_from and config.run_dir.startswith("runs/") and config.data.source
