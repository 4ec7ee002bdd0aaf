"""Folders written by other programs: wrapped names, one tensor per expert, adapters, other models'
tensors."""

import json
import re
import warnings

import jax
import numpy as np
import pytest
from helpers.checkpoints import SIZES, original_layout, random_checkpoint
from safetensors.numpy import load_file, save_file

from gptoss_jax import startup
from gptoss_jax.checkpoints.export import convert
from gptoss_jax.checkpoints.load import load_model, load_pretrained
from gptoss_jax.config import MeshConfig
from gptoss_jax.model.parameters import path_names
from gptoss_jax.parallel.mesh import make_mesh

LAYER_1 = "model.layers.1."


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("published"), 3, "float32")


@pytest.fixture
def written(published, tmp_path):
    """(tensors, config) -> a folder with these tensors, and the config with these changes."""

    def write(tensors, **config):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        save_file(
            {name: np.ascontiguousarray(array) for name, array in tensors.items()},
            folder / "model.safetensors",
        )
        values = json.loads((published / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **config}))
        return folder

    return write


def leaves(folder, **options):
    _, params, _ = load_pretrained(folder, **options)
    found = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(path_names(path)): np.asarray(leaf) for path, leaf in found}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def refusal(folder):
    with pytest.raises(ValueError) as caught:
        load_pretrained(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ") and "\n" not in message and len(message) < 700
    return message


# Prefixes.

WRAPPED = {
    "data parallel": "module.{}",
    "compiled": "_orig_mod.{}",
    "peft": "base_model.model.{}",
    "compiled in data parallel": "module._orig_mod.{}",
    "data parallel, compiled": "_orig_mod.module.{}",
    "peft in data parallel, compiled": "_orig_mod.module.base_model.model.{}",
    "peft of a compiled model": "base_model.model._orig_mod.{}",
    "peft of peft": "base_model.model.base_model.model.{}",
    "fsdp": "_fsdp_wrapped_module.{}",
    "deepspeed": "_forward_module.module.{}",
    "a trainer's attribute": "model.{}",
    "a trainer's attribute, compiled": "model._orig_mod.{}",
}


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("form", WRAPPED.values(), ids=WRAPPED)
def test_known_prefixes_are_removed(published, written, form):
    tensors = load_file(published / "model.safetensors")
    folder = written({form.format(name): array for name, array in tensors.items()})
    assert_same(leaves(folder), leaves(published))


def test_prefixes_in_the_original_layout(published, written, tmp_path):
    tensors = load_file(original_layout(published, tmp_path / "plain") / "model.safetensors")
    folder = written({f"module.{name}": array for name, array in tensors.items()})
    assert_same(leaves(folder), leaves(published))


def test_wrappers_within_a_name(published, written):
    def name_in_wrappers(name):
        name = re.sub(r"layers\.(\d+)\.", r"layers.\1._checkpoint_wrapped_module._orig_mod.", name)
        return name.replace("self_attn.", "self_attn._fsdp_wrapped_module.")

    tensors = load_file(published / "model.safetensors")
    folder = written({name_in_wrappers(name): array for name, array in tensors.items()})
    assert_same(leaves(folder), leaves(published))


def test_base_model_without_its_head(published, written):
    tensors = load_file(published / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors = {name.removeprefix("model."): array for name, array in tensors.items()}
    tied = leaves(written(tensors, tie_word_embeddings=True))
    expected = leaves(published)
    del expected["head.weight"]
    assert_same(tied, expected)
    assert refusal(written(tensors)).endswith("1 tensors do not fit its config: lm_head.weight is missing")


def test_two_tensors_with_the_same_name(published, written):
    tensors = load_file(published / "model.safetensors")
    tensors["module.model.norm.weight"] = tensors["model.norm.weight"].copy()
    message = refusal(written(tensors))
    assert (
        "contains both model.norm.weight and module.model.norm.weight, which are the same tensor" in message
    )


# One tensor per expert.


def one_by_one(tensors, names):
    """Splits tensors by expert: `names` are those of gate, up and down, or of gate_up and down."""
    found = {}
    for name, array in tensors.items():
        stem, _, last = name.rpartition(".experts.")
        if not stem:
            found[name] = array
            continue
        kind = "bias" if last.endswith("_bias") else "weight"
        for e, expert in enumerate(array):
            # [in, out] in the published layout, [out, in] in a linear layer.
            rows = expert if kind == "bias" else expert.T
            if last.startswith("down"):
                parts = {names[-1]: rows}
            elif len(names) == 2:
                parts = {names[0]: rows}
            else:
                parts = {names[0]: rows[0::2], names[1]: rows[1::2]}
            for part, rows in parts.items():
                found[f"{stem}.experts.{part.format(e)}.{kind}"] = rows
    return found


LINEAR = ("{}.gate_proj", "{}.up_proj", "{}.down_proj")
LISTS = ("gate_up_projs.{}", "down_projs.{}")


@pytest.mark.parametrize("names", [LINEAR, LISTS], ids=["gate and up apart", "in one matrix"])
@pytest.mark.parametrize("experts", [None, "bfloat16", "mxfp4"])
def test_per_expert_tensors(published, written, names, experts):
    tensors = load_file(published / "model.safetensors")
    folder = written({f"module.{name}": array for name, array in one_by_one(tensors, names).items()})
    assert_same(leaves(folder, experts=experts), leaves(published, experts=experts))


def test_per_expert_tensors_are_converted(published, written, tmp_path):
    tensors = load_file(published / "model.safetensors")
    convert(written(one_by_one(tensors, LINEAR)), tmp_path / "new")
    assert_same(load_file(tmp_path / "new" / "model.safetensors"), tensors)


@pytest.mark.parametrize("names", [LINEAR, LISTS], ids=["gate and up apart", "in one matrix"])
def test_per_expert_tensors_on_a_mesh(written, names, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "vocab_size", 212)
    monkeypatch.setitem(SIZES, "num_local_experts", 10)
    whole = random_checkpoint(tmp_path / "whole", 3, "float32")
    folder = written(one_by_one(load_file(whole / "model.safetensors"), names), **SIZES)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    assert_same(leaves(folder, mesh=mesh), leaves(whole))


def test_mismatched_per_expert_tensors(published, written):
    tensors = one_by_one(load_file(published / "model.safetensors"), LINEAR)
    del tensors[f"{LAYER_1}mlp.experts.6.up_proj.bias"]
    name = f"{LAYER_1}mlp.experts.2.down_proj.weight"
    tensors[name] = tensors[name].T
    message = refusal(written(tensors))
    assert f"{LAYER_1}mlp.experts.6.up_proj.bias is missing" in message
    assert f"{name} has shape [64, 160], expected [160, 64]" in message


def test_non_finite_expert_warns(published, written):
    tensors = one_by_one(load_file(published / "model.safetensors"), LINEAR)
    up = tensors[f"{LAYER_1}mlp.experts.3.up_proj.weight"] = tensors[
        f"{LAYER_1}mlp.experts.3.up_proj.weight"
    ].copy()
    up[5, 7] = np.nan
    with pytest.warns(UserWarning, match=f"NaN or infinite values in {LAYER_1}mlp.experts.gate_up_proj$"):
        found = leaves(written(tensors))
    # Layer 1 is the first of the second place in the period; axes are layer, expert, input, up, output.
    assert np.argwhere(np.isnan(found["blocks.1.moe.gate_up"])).tolist() == [[0, 3, 7, 1, 5]]


# Foreign tensors.

# Names to add, or a function that renames; and words of the message.
FOREIGN = {
    "lora": (
        {f"{LAYER_1}self_attn.q_proj.lora_A.default.weight"},
        "a PEFT model with an unmerged adapter",
    ),
    "peft's wrapped layers": (
        lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"),
        "a PEFT model with an unmerged adapter",
    ),
    "experts in an unknown order": (
        lambda name: re.sub(r"experts\.gate_up_proj$", "experts.0.gate_up_proj.weight", name),
        "separate experts with gate and up in one matrix, in an unknown order",
    ),
    "mixtral": (lambda name: name.replace("mlp.router", "block_sparse_moe.gate"), "a Mixtral model"),
    "qwen": (
        lambda name: name.replace("mlp.router", "mlp.gate"),
        "another mixture-of-experts model, such as Qwen",
    ),
    "llama": ({f"{LAYER_1}mlp.gate_proj.weight"}, "a model without experts, such as Llama"),
    "gguf": (lambda name: name.replace("model.layers", "blk"), "a model with GGUF tensor names"),
    "bitsandbytes": (
        {f"{LAYER_1}mlp.experts.gate_up_projs.0.weight.absmax"},
        "a model quantized with GPTQ, AWQ, bitsandbytes or similar",
    ),
    "gpt-2": ({"transformer.h.0.attn.c_attn.weight"}, "a GPT-2 model"),
}


@pytest.mark.parametrize(("change", "words"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_tensors_are_named(published, written, change, words):
    tensors = load_file(published / "model.safetensors")
    if isinstance(change, set):
        tensors |= {name: np.ones(3, np.float32) for name in change}
    else:
        tensors = {change(name): array for name, array in tensors.items()}
    assert f"these tensors belong to {words}" in refusal(written(tensors))


# Whole commands.

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "openai/gpt-oss-20b"}


def test_adapter_folder_is_recognized_before_its_config_and_tokenizer(tmp_path):
    save_file(
        {"base_model.model.x.lora_A.weight": np.ones(3, np.float32)}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    assert "an adapter (LORA), not a whole model; its base model is openai/gpt-oss-20b" in refusal(tmp_path)
    for action in (load_model, lambda folder: convert(folder, tmp_path / "new")):
        with pytest.raises(ValueError, match=r"an adapter \(LORA\), not a whole model"):
            action(tmp_path)
    assert not (tmp_path / "new").exists()
    # Beside a complete model, it is a leftover.
    random_checkpoint(tmp_path, 3, "bfloat16")
    with pytest.warns(UserWarning, match="not applied: adapter_config.json, adapter_model.safetensors$"):
        load_pretrained(tmp_path)


def test_command_prints_each_warning_once_on_one_line(published, written, capsys):
    folder = written(load_file(published / "model.safetensors"), experts_per_token=2, novel=1)
    save_file({"t": np.ones(3, np.float32)}, folder / "old.safetensors")

    def command():
        for _ in range(2):
            # Libraries change the warning filters, after which Python repeats the same warning.
            warnings.simplefilter("always")
            load_pretrained(folder)

    assert startup.run(command, "gptoss") == 0
    assert capsys.readouterr().err.splitlines() == [
        f"gptoss: warning: {folder}/config.json: unknown fields are ignored: novel",
        f"gptoss: warning: {folder}/config.json: experts_per_token is 2, but num_experts_per_tok is 3: "
        "3 is used",
        f"gptoss: warning: {folder}: the weights are read from model.safetensors, as transformers does; "
        "not read: old.safetensors",
    ]
