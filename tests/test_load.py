"""Loading models: parameters by hand, dtypes, meshes, memory, and errors."""

import contextlib
import dataclasses
import json
import re
import shutil
import tracemalloc

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import SIZES, random_checkpoint
from helpers.weights import (
    BFLOAT16,
    FORMATS,
    LAYER_2,
    TOKENS,
    assert_same_leaves,
    leaves,
    logits,
    one_line,
    tensors_of,
    tree_by_hand,
    warned,
)
from jax.experimental.layout import Format
from safetensors.numpy import load_file, save_file

from gptoss_jax.checkpoints import sharded_io
from gptoss_jax.checkpoints.export import save_pretrained, write_folder
from gptoss_jax.checkpoints.load import from_pretrained, load_pretrained
from gptoss_jax.checkpoints.readers import open_weights
from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.config import MeshConfig, ModelConfig, TrainConfig
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.model.parameters import parameter_shardings
from gptoss_jax.model.transformer import get_params, init_params
from gptoss_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize("form", FORMATS)
def test_parameters_match_those_by_hand(hf_folder, form):
    model = from_pretrained(hf_folder(form), dtype="float32", experts="float32")
    assert model.config == dataclasses.replace(ModelConfig.from_hf(hf_folder(form)), compute_dtype="float32")
    assert model.origin == str(hf_folder(form))
    expected = tree_by_hand(load_file(hf_folder(form) / "model.safetensors"))
    assert_same_leaves(leaves(get_params(model)), expected)


@pytest.mark.parametrize("form", FORMATS)
def test_parameters_match_those_by_hand_in_bfloat16(hf_folder, form):
    _, params, _ = load_pretrained(hf_folder(form), dtype="bfloat16", experts="bfloat16")
    expected = tree_by_hand(load_file(hf_folder(form) / "model.safetensors"))
    assert_same_leaves(leaves(params), {name: leaf.astype(BFLOAT16) for name, leaf in expected.items()})


@pytest.mark.parametrize("form", FORMATS)
def test_original_layout_gives_the_same_parameters(hf_folder, original_folder, form):
    config, params, origin = load_pretrained(original_folder(form))
    expected_config, expected, _ = load_pretrained(hf_folder(form))
    assert config == expected_config and origin == original_folder(form) / "original"
    assert_same_leaves(leaves(params), leaves(expected))
    # The path of `original/` itself works, too.
    _, params, _ = load_pretrained(original_folder(form) / "original")
    assert_same_leaves(leaves(params), leaves(expected))


def test_packed_experts_keep_their_bytes(hf_folder):
    theirs = load_file(hf_folder("mxfp4") / "model.safetensors")
    found = leaves(get_params(from_pretrained(hf_folder("mxfp4"))))
    for place, row, layer in ((0, 0, 0), (1, 0, 1), (0, 1, 2), (1, 1, 3)):
        for part in ("blocks", "scales"):
            tensor = theirs[f"model.layers.{layer}.mlp.experts.gate_up_proj_{part}"]
            array = found[f"blocks.{place}.moe.gate_up_{part}"][row]
            np.testing.assert_array_equal(array, tensor)
            tensor = theirs[f"model.layers.{layer}.mlp.experts.down_proj_{part}"]
            np.testing.assert_array_equal(found[f"blocks.{place}.moe.down_{part}"][row], tensor)


def test_packed_logits_match_dequantized_weights(hf_folder):
    packed = logits(from_pretrained(hf_folder("mxfp4"), dtype="float32"))
    plain = logits(from_pretrained(hf_folder("mxfp4"), dtype="float32", experts="float32"))
    assert packed.shape == (*TOKENS.shape, SIZES["vocab_size"]) and np.abs(packed).max() > 1
    # Different kernels sum in different orders.
    np.testing.assert_allclose(packed, plain, rtol=0, atol=5e-6 * np.abs(plain).max())


@pytest.mark.parametrize("form", ["bfloat16", "float32"])
def test_quantizing_while_loading(hf_folder, form):
    _, params, _ = load_pretrained(hf_folder(form), experts="mxfp4")
    expected = {}
    for name, leaf in leaves(load_pretrained(hf_folder(form))[1]).items():
        if name.endswith(("gate_up", "down")):
            rows = np.asarray(leaf).swapaxes(2, -1).astype(np.float32)
            # The rows of gate and up, [layers, E, F, 2, D], alternate.
            parts = codec.quantize(rows.reshape(*rows.shape[:2], -1, rows.shape[-1]), xp=np)
            expected |= {f"{name}_blocks": parts[0], f"{name}_scales": parts[1]}
        else:
            expected[name] = leaf
    assert_same_leaves(leaves(params), expected)


TYPES = [
    # Format of the file, dtype, experts -> dtype of all but the experts, dtype of the experts.
    ("bfloat16", None, None, "bfloat16", "bfloat16"),
    ("bfloat16", "float32", None, "float32", "float32"),
    ("float32", None, None, "float32", "float32"),
    ("float32", "bfloat16", None, "bfloat16", "bfloat16"),
    ("float32", None, "bfloat16", "float32", "bfloat16"),
    ("float32", "bfloat16", "mxfp4", "bfloat16", "uint8"),
    ("mxfp4", None, None, "bfloat16", "uint8"),
    ("mxfp4", "float32", None, "float32", "uint8"),
    ("mxfp4", "float32", "mxfp4", "float32", "uint8"),
    ("mxfp4", None, "bfloat16", "bfloat16", "bfloat16"),
    ("mxfp4", None, "float32", "bfloat16", "float32"),
    ("mxfp4", "float32", "bfloat16", "float32", "bfloat16"),
]


@pytest.mark.parametrize(("form", "dtype", "experts", "rest", "matrices"), TYPES)
def test_dtypes(hf_folder, form, dtype, experts, rest, matrices):
    config, params, _ = load_pretrained(hf_folder(form), dtype=dtype, experts=experts)
    assert config.compute_dtype == (dtype or "auto")
    assert config.expert_format == ("mxfp4" if matrices == "uint8" else "plain")
    for name, leaf in leaves(params).items():
        expert = re.search(r"moe\.(gate_up|down)(_blocks|_scales)?$", name)
        assert leaf.dtype == (matrices if expert else rest), name


def test_float16_files(edited_folder, tmp_path):
    def narrow(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float16)

    folder = edited_folder("float32", narrow)
    found = leaves(load_pretrained(folder)[1])
    assert {leaf.dtype.name for leaf in found.values()} == {"float16"}
    found = leaves(load_pretrained(folder, dtype="float32")[1])
    assert_same_leaves(found, tree_by_hand(load_file(folder / "model.safetensors")))
    # Quantized from the same float32 values, and saved as float32, which the format supports.
    write_folder(open_weights(folder), tmp_path / "float32", "float32")
    packed = leaves(load_pretrained(folder, "float32", "mxfp4")[1])
    assert_same_leaves(packed, leaves(load_pretrained(tmp_path / "float32", experts="mxfp4")[1]))
    write_folder(open_weights(folder), tmp_path / "new")
    assert {array.dtype.name for array in tensors_of(tmp_path / "new").values()} == {"float32"}


@pytest.mark.parametrize(
    ("form", "experts", "gate_up_shard"),
    [
        ("bfloat16", None, (2, 5, 80, 2, 32)),
        ("mxfp4", None, (2, 5, 32, 5, 16)),
        ("mxfp4", "float32", (2, 5, 80, 2, 32)),
        ("bfloat16", "mxfp4", (2, 5, 32, 5, 16)),
    ],
)
def test_mesh_holds_the_same_parameters(divisible_folder, form, experts, gate_up_shard):
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    alone = from_pretrained(divisible_folder(form), dtype="float32", experts=experts)
    shared = from_pretrained(divisible_folder(form), dtype="float32", experts=experts, mesh=mesh)
    expected = leaves(get_params(alone))
    shardings = leaves(parameter_shardings(get_params(alone), mesh))
    for name, array in leaves(get_params(shared)).items():
        assert array.dtype == expected[name].dtype, name
        assert array.sharding.is_equivalent_to(shardings[name], array.ndim), name
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected[name])[shard.index], err_msg=name)
    moe = get_params(shared)["blocks"]["0"]["moe"]
    gate_up = moe["gate_up"] if "gate_up" in moe else moe["gate_up_blocks"]
    assert gate_up.addressable_shards[0].data.shape == gate_up_shard
    if experts is None:
        with jax.set_mesh(mesh):
            found = logits(shared)
        plain = logits(alone)
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


@pytest.mark.parametrize("mesh_config", [None, MeshConfig(fsdp=2, expert=2, tensor=2)])
def test_memory_layouts_on_tpu(divisible_folder, mesh_config, monkeypatch):
    mesh = mesh_config and make_mesh(mesh_config)
    plain = from_pretrained(divisible_folder("mxfp4"), mesh=mesh)
    monkeypatch.setattr(sharded_io, "_platform", lambda sharding: "tpu")
    model = from_pretrained(divisible_folder("mxfp4"), mesh=mesh)
    expected, orders = leaves(get_params(plain)), {}
    for name, array in leaves(get_params(model)).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
        assert array.sharding == expected[name].sharding
        orders[name.removeprefix("blocks.0.")] = array.format.layout.major_to_minor
    # [layers, experts, outputs, groups, bytes] and [layers, experts, outputs, groups]: outputs innermost.
    assert orders["moe.gate_up_blocks"] == orders["moe.down_blocks"] == (0, 1, 3, 4, 2)
    assert orders["moe.gate_up_scales"] == orders["moe.down_scales"] == (0, 1, 3, 2)
    assert orders["embedding.weight"] == orders["head.weight"] == (0, 1)
    assert orders["attention.q"] == (0, 1, 2, 3)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        np.testing.assert_array_equal(logits(model), logits(plain))


def test_mesh_must_divide_the_sizes(hf_folder):
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    with pytest.raises(ValueError, match=r"mesh\.\w+ is 2: must divide model\.\w+ \((211|7)\)"):
        from_pretrained(hf_folder("mxfp4"), mesh=mesh)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "float16"}, "dtype is 'float16': must be bfloat16, float32 or None"),
        ({"experts": "int8"}, "experts is 'int8': must be bfloat16, float32, mxfp4 or None"),
    ],
)
def test_invalid_dtype_or_experts(hf_folder, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        from_pretrained(hf_folder("mxfp4"), **arguments)
    one_line(caught)
    if "experts" in arguments:
        with pytest.raises(ValueError, match=words):
            save_pretrained(from_pretrained(hf_folder("mxfp4")), tmp_path / "new", **arguments)
        assert not (tmp_path / "new").exists()


def test_all_mismatched_tensors_are_named_at_once(edited_folder):
    def change(tensors):
        del tensors[LAYER_2 + "mlp.router.bias"]
        tensors[LAYER_2 + "self_attn.rotary.inv_freq"] = np.ones(3, np.float32)
        tensors[LAYER_2 + "self_attn.o_proj.weight"] = tensors[LAYER_2 + "self_attn.o_proj.weight"].T.copy()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
        tensors[LAYER_2 + "mlp.experts.down_proj_scales"] = np.ones((7, 160, 2), np.float32)

    folder = edited_folder("mxfp4", change)
    with pytest.raises(ValueError) as caught:
        from_pretrained(folder)
    message = one_line(caught)
    assert message.startswith(f"{folder}: 5 tensors")
    for words in (
        f"{LAYER_2}mlp.router.bias is missing",
        f"{LAYER_2}self_attn.rotary.inv_freq is not part of this model",
        f"{LAYER_2}self_attn.o_proj.weight has shape [96, 160], expected [160, 96]",
        "model.norm.weight has dtype float64, expected bfloat16 or float16 or float32",
        f"{LAYER_2}mlp.experts.down_proj_scales has dtype float32, expected uint8",
    ):
        assert words in message, message


def test_many_mismatched_tensors_are_cut_short(hf_folder, edited_folder):
    folder = edited_folder("bfloat16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": 32}))
    wrong = r"self_attn\.q_proj\.weight has shape \[96, 160\], expected \[192, 160\]"
    with pytest.raises(ValueError, match=wrong):
        from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 192}))
    with pytest.raises(ValueError, match="and [0-9]+ more$") as caught:
        from_pretrained(folder)
    assert len(one_line(caught)) < 3000


def test_overflow_of_the_largest_codes_warns(edited_folder):
    def change(tensors):
        tensors[LAYER_2 + "mlp.experts.down_proj_scales"][3, 5, 1] = 254
        tensors[LAYER_2 + "mlp.experts.down_proj_blocks"][3, 5, 1, 0] = 0x72

    model, message = warned(lambda: from_pretrained(edited_folder("mxfp4", change), experts="bfloat16"))
    assert LAYER_2 + "mlp.experts.down_proj" in message
    # Expert 3, inputs 32 and 33 (codes 2 and 7), output 5.
    found = np.asarray(get_params(model)["blocks"]["0"]["moe"]["down"][1, 3, 32:34, 5], np.float32)
    assert found.tolist() == [2.0**127, np.inf]


def test_missing_folders(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder") as caught:
        from_pretrained(tmp_path / "nowhere")
    one_line(caught)
    missing = r"openai/gpt-oss-99b: no such folder; did you mean hf:openai/gpt-oss-99b\?"
    with pytest.raises(ValueError, match=missing):
        from_pretrained("openai/gpt-oss-99b")
    with pytest.raises(ValueError, match="neither config.json nor original/config.json") as caught:
        from_pretrained(tmp_path)
    one_line(caught)
    random_checkpoint(tmp_path / "bare", 3, "bfloat16")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="bare: contains no .safetensors file"):
        from_pretrained(tmp_path / "bare")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hugging Face cache, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_hub_model_that_is_not_cached(hub):
    with pytest.raises(ValueError, match="hf:some/model: cannot be downloaded") as caught:
        from_pretrained("hf:some/model")
    assert len(one_line(caught)) < 600
    with pytest.raises(ValueError, match="hf:not a name: cannot be downloaded"):
        from_pretrained("hf:not a name")


def test_hub_model_in_the_cache(hub, hf_folder):
    repository = hub / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123456789abcdef")
    shutil.copytree(hf_folder("mxfp4"), repository / "snapshots" / "0123456789abcdef")
    _, params, origin = load_pretrained("hf:some/model")
    assert origin == repository / "snapshots" / "0123456789abcdef"
    assert_same_leaves(leaves(params), leaves(load_pretrained(hf_folder("mxfp4"))[1]))


def test_run_folder_in_another_dtype(run_folder):
    model = from_pretrained(run_folder, dtype="bfloat16")
    exact = leaves(get_params(from_pretrained(run_folder)))
    assert model.config.compute_dtype == "bfloat16"
    assert_same_leaves(
        leaves(get_params(model)), {name: np.asarray(leaf).astype(BFLOAT16) for name, leaf in exact.items()}
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with packed experts, about 60 MB in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"hidden_size": 1024, "intermediate_size": 512, "num_local_experts": 5}.items():
            patch.setitem(SIZES, name, size)
        return random_checkpoint(tmp_path_factory.mktemp("large"), 3, "mxfp4")


@contextlib.contextmanager
def traced_peak():
    """Yields a list that receives the peak of the bytes allocated by NumPy."""
    found = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("experts", "dtype"), [(None, None), ("bfloat16", None), ("float32", "float32")])
def test_loading_needs_less_than_half_a_tensor_besides_the_result(large, monkeypatch, experts, dtype):
    # Each thread uses a few MB.
    monkeypatch.setattr(sharded_io.os, "sched_getaffinity", lambda process: {0, 1})
    load_pretrained(large, dtype, experts)
    with traced_peak() as peak:
        _, params, _ = load_pretrained(large, dtype, experts)
    arrays = leaves(params)
    total = sum(array.nbytes for array in arrays.values())
    one = max(array.nbytes // len(array) for name, array in arrays.items() if "moe" in name)
    # The peak includes the result: on CPU, the arrays share NumPy's memory.
    assert total <= peak[0] < total + one / 2


def test_accelerators_are_filled_layer_by_layer(hf_folder):
    # As for a GPU or TPU; on CPU the device would share the host's array.
    source = open_weights(hf_folder("mxfp4"))
    layers = [source.tensor("moe.gate_up", layer) for layer in (0, 2)]
    index = (slice(1, 3), slice(0, None), slice(0, 2), slice(3, 9))
    index = tuple(slice(*part.indices(size)) for part, size in zip(index, layers[0].shape, strict=True))
    devices = jax.devices()[2:4]
    formats = [Format(None, jax.sharding.SingleDeviceSharding(device)) for device in devices]
    made, non_finite = sharded_io._stack_on_devices(BFLOAT16, index, layers, formats)
    wanted, _ = sharded_io._read_on_host(BFLOAT16, index, layers)
    assert [array.devices() for array in made] == [{device} for device in devices] and non_finite == set()
    for array in made:
        np.testing.assert_array_equal(np.asarray(array), wanted)


def test_sharded_layer_on_the_host(divisible_folder):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    gate_up = leaves(load_pretrained(divisible_folder("float32"), mesh=mesh)[1])["blocks.1.moe.gate_up"]
    np.testing.assert_array_equal(sharded_io.layer_on_host(gate_up, 1), np.asarray(gate_up)[1])
    head = leaves(load_pretrained(divisible_folder("float32"), mesh=mesh)[1])["head.weight"]
    np.testing.assert_array_equal(sharded_io.layer_on_host(head, None), np.asarray(head))


def test_adapter_beside_the_model_is_ignored(edited_folder):
    folder = edited_folder("bfloat16")
    save_file({"lora": np.zeros(3, np.float32)}, folder / "adapter_model.safetensors")
    assert open_weights(folder).config.hidden_size == SIZES["hidden_size"]


def test_dangling_symlink(edited_folder):
    folder = edited_folder("bfloat16")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(ValueError, match="model.safetensors links to a file that is not there") as caught:
        open_weights(folder)
    one_line(caught)


@pytest.mark.parametrize("same", [True, False])
def test_head_in_the_file_of_a_tied_model(edited_folder, same):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(not same)

    folder = edited_folder("float32", change)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    if same:
        assert "head" not in load_pretrained(folder)[1]
    else:
        with pytest.raises(ValueError, match="tie_word_embeddings is true, but the head is not"):
            open_weights(folder)


def test_run_with_a_nan_warns(run_folder, tiny_config, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    params = init_params(TrainConfig.load(folder / "config.json").model, jax.random.key(0))
    params["blocks"]["1"]["moe"]["router"] = params["blocks"]["1"]["moe"]["router"].at[1, 2, 3].set(jnp.nan)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, params, {"step": jnp.array(1)}, {"step": 1})
    checkpoints.close()
    _, message = warned(lambda: from_pretrained(folder))
    assert message.endswith("contains NaN or infinite values in model.layers.3.mlp.router.weight")
