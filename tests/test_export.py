"""Saving and converting models: bytes, formats, meshes, sidecar files, and errors."""

import dataclasses
import json
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.weights import (
    BFLOAT16,
    FORMATS,
    LAYER_2,
    TOKENS,
    assert_same_leaves,
    assert_same_tensors,
    dequantized,
    leaves,
    logits,
    one_line,
    tensors_of,
    warned,
)
from safetensors.numpy import load_file

from gptoss_jax.checkpoints import export
from gptoss_jax.checkpoints.export import convert, save_pretrained, write_folder
from gptoss_jax.checkpoints.load import from_pretrained, load_pretrained
from gptoss_jax.checkpoints.readers import open_weights
from gptoss_jax.config import MeshConfig, ModelConfig, TrainConfig
from gptoss_jax.data.tokenizer import load_tokenizer, make_tokenizer
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.model.transformer import bind, get_params
from gptoss_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    ("form", "name", "value", "experts"),
    [
        ("bfloat16", "self_attn.k_proj.bias", np.nan, None),
        ("bfloat16", "mlp.experts.gate_up_proj", -np.inf, None),
        ("float32", "input_layernorm.weight", np.inf, None),
        ("bfloat16", "mlp.experts.down_proj", np.nan, "mxfp4"),
        ("mxfp4", "mlp.experts.down_proj_scales", 255, None),
        ("mxfp4", "mlp.experts.gate_up_proj_scales", 255, "bfloat16"),
    ],
)
def test_non_finite_values_warn(edited_folder, form, name, value, experts, tmp_path):
    def change(tensors):
        tensors[LAYER_2 + name].reshape(-1)[-3] = value

    folder = edited_folder(form, change)
    model, message = warned(lambda: from_pretrained(folder, experts=experts))
    found = re.findall(r"model\.[\w.]+\w", message.removeprefix(str(folder)))
    stem = re.sub("_(scales|blocks)$", "", LAYER_2 + name)
    assert len(found) == 1 and found[0].startswith(stem) and str(folder) in message, message
    # Saving writes the value unchanged, and warns again.
    _, message = warned(lambda: save_pretrained(model, tmp_path / "again"))
    assert stem in message
    if experts is None:
        assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(folder))


@pytest.mark.parametrize("form", FORMATS)
def test_finite_weights_do_not_warn(hf_folder, tmp_path, form):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_pretrained(from_pretrained(hf_folder(form)), tmp_path / "new")
    assert [str(one.message) for one in caught] == []
    assert (tmp_path / "new" / "config.json").is_file()


@pytest.mark.parametrize("form", FORMATS)
def test_round_trip_keeps_all_bytes(hf_folder, tmp_path, form):
    save_pretrained(from_pretrained(hf_folder(form)), tmp_path / "new")
    assert_same_tensors(tensors_of(tmp_path / "new"), tensors_of(hf_folder(form)))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    assert ModelConfig.from_hf(tmp_path / "new") == ModelConfig.from_hf(hf_folder(form))
    values = json.loads((tmp_path / "new" / "config.json").read_text())
    assert ("quantization_config" in values) == (form == "mxfp4")
    assert values["torch_dtype"] == ("float32" if form == "float32" else "bfloat16")


@pytest.mark.parametrize("form", FORMATS)
def test_original_layout_is_written_as_hugging_face(hf_folder, original_folder, tmp_path, form):
    save_pretrained(from_pretrained(original_folder(form)), tmp_path / "model")
    assert_same_tensors(tensors_of(tmp_path / "model"), tensors_of(hf_folder(form)))
    # The same without a model in between.
    heard = []
    write_folder(
        open_weights(original_folder(form)),
        tmp_path / "files",
        on_progress=lambda done, total: heard.append((done, total)),
    )
    assert_same_tensors(tensors_of(tmp_path / "files"), tensors_of(hf_folder(form)))
    total = sum(array.nbytes for array in tensors_of(hf_folder(form)).values())
    assert heard[-1] == (total, total) and [done for done, _ in heard] == sorted(done for done, _ in heard)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("experts", FORMATS)
def test_every_format_into_every_other(hf_folder, tmp_path, form, experts):
    write_folder(open_weights(hf_folder(form)), tmp_path / "files", experts)
    save_pretrained(from_pretrained(hf_folder(form)), tmp_path / "model", experts)
    found, theirs = tensors_of(tmp_path / "files"), tensors_of(hf_folder(form))
    assert_same_tensors(tensors_of(tmp_path / "model"), found)
    expected = {}
    rest = np.float32 if experts == "float32" else BFLOAT16
    for name, array in theirs.items():
        if name.endswith("_scales") or name.endswith("_blocks"):
            if experts == "mxfp4":
                expected[name] = array
            elif name.endswith("_blocks"):
                values = dequantized(array, theirs[name.replace("_blocks", "_scales")])
                expected[name.removesuffix("_blocks")] = np.ascontiguousarray(values.swapaxes(1, 2)).astype(
                    rest
                )
        elif experts == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            values = np.ascontiguousarray(array.swapaxes(1, 2)).astype(np.float32)
            expected[f"{name}_blocks"], expected[f"{name}_scales"] = codec.quantize(values, xp=np)
        else:
            expected[name] = array.astype(rest)
    assert_same_tensors(found, expected)


@pytest.mark.parametrize("form", ["bfloat16", "mxfp4"])
@pytest.mark.parametrize("experts", ["bfloat16", "mxfp4"])
def test_sharded_model_is_written_like_an_unsharded_one(divisible_folder, tmp_path, form, experts):
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    save_pretrained(from_pretrained(divisible_folder(form), mesh=mesh), tmp_path / "mesh", experts)
    write_folder(open_weights(divisible_folder(form)), tmp_path / "one", experts)
    assert_same_tensors(tensors_of(tmp_path / "mesh"), tensors_of(tmp_path / "one"))


def test_shards(hf_folder, tmp_path):
    save_pretrained(from_pretrained(hf_folder("mxfp4")), tmp_path / "new", shard_bytes=200_000)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    expected = tensors_of(hf_folder("mxfp4"))
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    files = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3
    assert_same_tensors(tensors_of(tmp_path / "new"), expected)
    again = leaves(load_pretrained(tmp_path / "new")[1])
    assert_same_leaves(again, leaves(load_pretrained(hf_folder("mxfp4"))[1]))


@pytest.fixture(scope="module")
def bare_config(tiny_config):
    """A model with tied embeddings and without the optional parameters that the published format requires."""
    return dataclasses.replace(
        tiny_config,
        attention_bias=False,
        expert_bias=False,
        router_bias=False,
        learned_sinks=False,
        tie_word_embeddings=True,
    )


@pytest.mark.parametrize("experts", ["float32", "bfloat16"])
def test_absent_parameters_are_written_without_effect(bare_config, random_params, tmp_path, experts):
    params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), random_params(bare_config)
    )
    model = bind(bare_config, params)
    save_pretrained(model, tmp_path / "new", experts)
    written = tensors_of(tmp_path / "new")
    assert "lm_head.weight" not in written and LAYER_2 + "self_attn.q_proj.bias" not in written
    for name in ("mlp.router.bias", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"):
        assert written[LAYER_2 + name].size and not written[LAYER_2 + name].astype(np.float32).any()
    sinks = written[LAYER_2 + "self_attn.sinks"].astype(np.float32)
    assert sinks.shape == (6,) and np.isfinite(sinks).all() and (sinks < -1e30).all()
    again = from_pretrained(tmp_path / "new", dtype="float32")
    assert again.config.learned_sinks and again.config.expert_bias and not again.config.attention_bias
    tokens = TOKENS % bare_config.vocab_size
    expected = logits(model, tokens)
    np.testing.assert_allclose(logits(again, tokens), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_model_outside_the_format_is_refused(notebook_config, random_params, tmp_path):
    model = bind(notebook_config, random_params(notebook_config))
    with pytest.raises(ValueError) as caught:
        save_pretrained(model, tmp_path / "new", "mxfp4")
    message = one_line(caught)
    for words in ("sink_tokens is 2", "swiglu_up_offset is 0.0", "swiglu_limit is None", "hidden_size is 26"):
        assert words in message
    assert list(tmp_path.iterdir()) == []


SIDECAR_FILES = [
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def with_sidecar_files(folder):
    for name in SIDECAR_FILES:
        (folder / name).write_text(json.dumps({"file": name, "bos_token_id": 198}))
    (folder / "notes.txt").write_text("not of the model")
    return folder


def test_sidecar_files_are_copied(edited_folder, tmp_path):
    folder = with_sidecar_files(edited_folder("mxfp4"))
    save_pretrained(from_pretrained(folder), tmp_path / "new")
    found = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert found == sorted([*SIDECAR_FILES, "config.json", "model.safetensors"])
    for name in SIDECAR_FILES:
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes()
    # config.json names no tokens here, so those in generation_config.json are used.
    assert json.loads((tmp_path / "new" / "config.json").read_text())["bos_token_id"] == 198


def test_sidecar_files_of_original_are_one_folder_up(original_folder, tmp_path):
    folder = with_sidecar_files(shutil.copytree(original_folder("bfloat16"), tmp_path / "folder"))
    save_pretrained(from_pretrained(folder), tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} >= set(SIDECAR_FILES)
    assert not (tmp_path / "new" / "notes.txt").exists()


def test_token_ids_of_config_json_are_kept(edited_folder, tmp_path):
    folder = with_sidecar_files(edited_folder("mxfp4"))
    config = json.loads((folder / "config.json").read_text())
    ids = {"eos_token_id": [7, 9], "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config | ids))
    save_pretrained(from_pretrained(folder), tmp_path / "new")
    found = json.loads((tmp_path / "new" / "config.json").read_text())
    assert {name: value for name, value in found.items() if name.endswith("_token_id")} == ids


def test_tokenizer_of_another_folder(hf_folder, edited_folder, tmp_path):
    folder = with_sidecar_files(edited_folder("mxfp4"))
    save_pretrained(from_pretrained(hf_folder("bfloat16")), tmp_path / "new", tokenizer=folder)
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_named_tokenizer_must_exist(hf_folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere") as caught:
        save_pretrained(from_pretrained(hf_folder("mxfp4")), tmp_path / "new", tokenizer=tmp_path / "nowhere")
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


def test_run_folder_is_written_with_its_tokenizer(run_folder, tmp_path):
    model = from_pretrained(run_folder)
    assert {leaf.dtype.name for leaf in leaves(get_params(model)).values()} == {"float32"}
    assert model.config == TrainConfig.load(run_folder / "config.json").model
    save_pretrained(model, tmp_path / "new")
    values = json.loads((tmp_path / "new" / "config.json").read_text())
    assert [values[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [256, 256, 256]
    assert values["torch_dtype"] == "float32"
    assert load_tokenizer(tmp_path / "new").same_ids_as(make_tokenizer("bytes"))
    again = from_pretrained(tmp_path / "new")
    assert_same_leaves(leaves(get_params(again)), leaves(get_params(model)))
    # The tokenizer of a saved folder is copied, too.
    save_pretrained(again, tmp_path / "third")
    assert load_tokenizer(tmp_path / "third").same_ids_as(make_tokenizer("bytes"))
    assert_same_tensors(tensors_of(tmp_path / "third"), tensors_of(tmp_path / "new"))


def test_dtype_of_only_some_layers(edited_folder, tmp_path):
    router = "model.layers.3.mlp.router.weight"

    def change(tensors):
        tensors[router] = np.random.default_rng(0).standard_normal(tensors[router].shape).astype(np.float32)

    folder = edited_folder("bfloat16", change)
    model = from_pretrained(folder)
    found = np.asarray(model.blocks[1].moe.router[...])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[1].T, load_file(folder / "model.safetensors")[router])
    save_pretrained(model, tmp_path / "new")
    assert tensors_of(tmp_path / "new")[router].dtype == np.float32


def test_source_folder_that_is_gone(edited_folder, tmp_path):
    folder = edited_folder("bfloat16")
    model = from_pretrained(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="is gone; name another folder"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_convert_checks_the_target_before_reading_a_run(run_folder, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    monkeypatch.setattr(export, "open_weights", lambda folder: pytest.fail("was read"))
    with pytest.raises(ValueError, match="already exists"):
        convert(run_folder, tmp_path / "taken")
    with pytest.raises(ValueError, match="hidden_size is 24, but MXFP4 requires a multiple of 32"):
        convert(run_folder, tmp_path / "new", "mxfp4")


def test_damaged_sidecar_file(edited_folder, tmp_path):
    folder = edited_folder("bfloat16")
    (folder / "config.json").write_text(
        json.dumps(
            {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if "token_id" not in k}
        )
    )
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match="generation_config.json") as caught:
        save_pretrained(from_pretrained(folder), tmp_path / "new")
    one_line(caught)
    assert not (tmp_path / "new").exists()


def test_nonempty_target_is_refused(hf_folder, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("content")
    with pytest.raises(ValueError, match="taken: already exists") as caught:
        save_pretrained(from_pretrained(hf_folder("mxfp4")), tmp_path / "taken")
    one_line(caught)
    # The model's own folder is not overwritten, either.
    folder = shutil.copytree(hf_folder("mxfp4"), tmp_path / "model")
    with pytest.raises(ValueError, match="already exists"):
        save_pretrained(from_pretrained(folder), folder)
    assert_same_tensors(tensors_of(folder), tensors_of(hf_folder("mxfp4")))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent.name != "model") == [
        "model", "precious", "taken",
    ]  # fmt: skip
