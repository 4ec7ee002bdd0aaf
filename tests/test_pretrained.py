"""Released weights in and out: names, layouts, bytes there and back, types, meshes, and what is refused."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
import tracemalloc
import warnings

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.checkpoints import SIZES, original_layout, random_checkpoint
from jax.experimental.layout import Format
from safetensors.numpy import load_file, save_file

from gptoss_jax.checkpoints import export, sharded_io
from gptoss_jax.checkpoints.export import convert, save_pretrained, write_folder
from gptoss_jax.checkpoints.load import from_pretrained, load_pretrained
from gptoss_jax.checkpoints.mappings import HUGGINGFACE, ORIGINAL, axis_sizes, expected_shapes
from gptoss_jax.checkpoints.readers import open_weights
from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from gptoss_jax.data.tokenizer import load_tokenizer, make_tokenizer
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.model.parameters import parameter_shardings, path_names
from gptoss_jax.model.transformer import bind, get_params, init_params
from gptoss_jax.parallel.mesh import make_mesh

PUBLISHED = pathlib.Path(__file__).parents[2] / "shared" / "data" / "configs"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FORMS = ["bfloat16", "float32", "mxfp4"]
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (4, 12))
LAYER_2 = "model.layers.2."


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(form) -> a Hugging Face folder. It is shared: copy it to change it."""

    @functools.cache
    def make(form):
        return random_checkpoint(tmp_path_factory.mktemp(form), 3, form)

    return make


@pytest.fixture(scope="module")
def original(published, tmp_path_factory):
    """(form) -> the same weights in the layout of `original/`, inside a folder that holds nothing else."""

    @functools.cache
    def make(form):
        folder = tmp_path_factory.mktemp(f"original-{form}")
        original_layout(published(form), folder / "original")
        return folder

    return make


@pytest.fixture
def copied(published, tmp_path):
    """(form, change) -> a copy of which `change` has changed the dict of tensors."""

    def make(form, change=lambda tensors: None):
        folder = shutil.copytree(published(form), tmp_path / f"copy-{form}")
        tensors = load_file(folder / "model.safetensors")
        tensors = {name: array.copy() for name, array in tensors.items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def tensors_of(folder):
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


def assert_same_tensors(found, expected):
    """Names, types, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@functools.cache
def _forward(config):
    return jax.jit(lambda params, tokens: bind(config, params)(tokens))


def logits(model, tokens=TOKENS):
    return np.asarray(_forward(model.config)(get_params(model), jnp.asarray(tokens, jnp.int32)))


def leaves(tree):
    """Path -> array of a parameter tree."""
    return {".".join(path_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_leaves(found, expected):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype, name
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def dequantised(blocks, scales):
    """Packed weights as float32 numbers [..., out, in]; low nibbles first."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = CODES[codes] * 2.0 ** (scales[..., None].astype(float) - 127)
    return values.reshape(*scales.shape[:-1], -1).astype(np.float32)


def block_by_hand(theirs, layer):
    """One block's parameters from Hugging Face tensors in float32, with nothing of the package."""
    D, H = SIZES["hidden_size"], SIZES["head_dim"]

    def read(name):
        return theirs[f"model.layers.{layer}.{name}"].astype(np.float32)

    def experts(name):
        if f"model.layers.{layer}.mlp.experts.{name}" in theirs:
            return read(f"mlp.experts.{name}")
        parts = (theirs[f"model.layers.{layer}.mlp.experts.{name}_{part}"] for part in ("blocks", "scales"))
        return dequantised(*parts).swapaxes(1, 2)

    found = {"attention_norm.scale": read("input_layernorm.weight")}
    for name in "qkv":
        found[f"attention.{name}"] = np.einsum(
            "nhd->dnh", read(f"self_attn.{name}_proj.weight").reshape(-1, H, D)
        )
        found[f"attention.{name}_bias"] = read(f"self_attn.{name}_proj.bias").reshape(-1, H)
    gate_up, bias = experts("gate_up_proj"), read("mlp.experts.gate_up_proj_bias")
    return found | {
        "attention.out": np.einsum("dnh->nhd", read("self_attn.o_proj.weight").reshape(D, -1, H)),
        "attention.out_bias": read("self_attn.o_proj.bias"),
        "attention.sinks": read("self_attn.sinks"),
        "moe_norm.scale": read("post_attention_layernorm.weight"),
        "moe.router": read("mlp.router.weight").T,
        "moe.router_bias": read("mlp.router.bias"),
        "moe.gate_up": np.stack([gate_up[..., 0::2], gate_up[..., 1::2]], axis=2),
        "moe.gate_up_bias": np.stack([bias[:, 0::2], bias[:, 1::2]], axis=1),
        "moe.down": experts("down_proj"),
        "moe.down_bias": read("mlp.experts.down_proj_bias"),
    }


def tree_by_hand(theirs):
    """The whole tree: layers 0 and 2 in the first place of the period, 1 and 3 in the second."""
    found = {
        "embedding.weight": theirs["model.embed_tokens.weight"].astype(np.float32),
        "final_norm.scale": theirs["model.norm.weight"].astype(np.float32),
        "head.weight": theirs["lm_head.weight"].astype(np.float32),
    }
    for place in (0, 1):
        first, second = (block_by_hand(theirs, layer) for layer in (place, place + 2))
        found |= {f"blocks.{place}.{name}": np.stack([first[name], second[name]]) for name in first}
    return found


# What the files hold.


@pytest.mark.parametrize(
    ("name", "total", "count"), [("gpt-oss-20b", 13_761_264_768, 459), ("gpt-oss-120b", 65_248_815_744, 687)]
)
def test_tensors_of_the_released_models(name, total, count):
    listing = PUBLISHED / f"{name}.tensors.json"
    if not listing.is_file():
        pytest.skip(f"the published list of tensors is not there: {listing}")
    expected = json.loads(listing.read_text())["tensors"]
    config = dataclasses.replace(ModelConfig.from_hf(PUBLISHED / f"{name}.json"), expert_format="mxfp4")
    found = expected_shapes(config, HUGGINGFACE)
    assert {key: list(shape) for key, shape in found.items()} == {
        key: entry["shape"] for key, entry in expected.items()
    }
    packed = {key for key in found if key.endswith(("_blocks", "_scales"))}
    assert packed == {key for key, entry in expected.items() if entry["dtype"] == "U8"}
    assert {entry["dtype"] for entry in expected.values()} == {"U8", "BF16"}
    assert sum(math.prod(shape) * (1 if key in packed else 2) for key, shape in found.items()) == total
    assert len(found) == count


@pytest.mark.parametrize("table", [HUGGINGFACE, ORIGINAL], ids=["huggingface", "original"])
def test_layouts_there_and_back(table, published):
    config = ModelConfig.from_hf(published("bfloat16"))
    N, K, H = (SIZES[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    rows = {
        "q": slice(0, N * H),
        "k": slice(N * H, (N + K) * H),
        "v": slice((N + K) * H, None),
        "": slice(None),
    }
    for key, layout in table.items():
        shape = layout.file_shape(config)
        tensor = np.random.default_rng(0).standard_normal(shape)
        ours = layout.to_model(tensor, config)
        assert np.shares_memory(ours, tensor), key
        np.testing.assert_array_equal(layout.to_file(ours), tensor[rows[layout.heads]], err_msg=key)
        if layout.keeps_first_axis:
            parts = [layout.to_file(ours[i : i + 3]) for i in range(0, len(ours), 3)]
            np.testing.assert_array_equal(np.concatenate(parts), tensor[rows[layout.heads]], err_msg=key)


def test_layouts_by_hand(published):
    config = ModelConfig.from_hf(published("bfloat16"))
    rng = np.random.default_rng(0)
    N, K, H, D, E, F = 6, 2, 16, 160, 7, 64
    assert [axis_sizes(config)[letter] for letter in "NKHDEF"] == [N, K, H, D, E, F]

    q = rng.standard_normal((N * H, D))
    found = HUGGINGFACE["attention.q"].to_model(q, config)
    np.testing.assert_array_equal(found, np.einsum("nhd->dnh", q.reshape(N, H, D)))
    assert found[5, 2, 3] == q[2 * H + 3, 5]
    out = rng.standard_normal((D, N * H))
    for table in (HUGGINGFACE, ORIGINAL):
        found = table["attention.out"].to_model(out, config)
        np.testing.assert_array_equal(found, np.einsum("dnh->nhd", out.reshape(D, N, H)))
    router = rng.standard_normal((E, D))
    for table in (HUGGINGFACE, ORIGINAL):
        np.testing.assert_array_equal(table["moe.router"].to_model(router, config), router.T)
    gate_up = rng.standard_normal((E, D, 2 * F))
    for layout, tensor in (
        (HUGGINGFACE["moe.gate_up"], gate_up),
        (ORIGINAL["moe.gate_up"], gate_up.swapaxes(1, 2).copy()),
    ):
        found = layout.to_model(tensor, config)
        np.testing.assert_array_equal(found[:, :, 0], gate_up[..., 0::2])
        np.testing.assert_array_equal(found[:, :, 1], gate_up[..., 1::2])
    blocks = rng.integers(0, 256, (E, 2 * F, D // 32, 16), np.uint8)
    found = HUGGINGFACE["moe.gate_up_blocks"].to_model(blocks, config)
    np.testing.assert_array_equal(found, blocks)
    down = rng.standard_normal((E, D, F))
    found = ORIGINAL["moe.down"].to_model(down, config)
    np.testing.assert_array_equal(found, np.einsum("edf->efd", down))

    qkv, bias = rng.standard_normal(((N + 2 * K) * H, D)), rng.standard_normal((N + 2 * K) * H)
    start = 0
    for part, heads in (("q", N), ("k", K), ("v", K)):
        rows = slice(start, start + heads * H)
        found = ORIGINAL[f"attention.{part}"].to_model(qkv, config)
        np.testing.assert_array_equal(found, np.einsum("nhd->dnh", qkv[rows].reshape(heads, H, D)))
        found = ORIGINAL[f"attention.{part}_bias"].to_model(bias, config)
        np.testing.assert_array_equal(found, bias[rows].reshape(heads, H))
        start = rows.stop
    assert start == len(qkv)


# Loading.


@pytest.mark.parametrize("form", FORMS)
def test_parameters_by_hand(published, form):
    model = from_pretrained(published(form), dtype="float32", experts="float32")
    assert model.config == dataclasses.replace(ModelConfig.from_hf(published(form)), compute_dtype="float32")
    assert model.origin == str(published(form))
    expected = tree_by_hand(load_file(published(form) / "model.safetensors"))
    assert_same_leaves(leaves(get_params(model)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_parameters_by_hand_in_bfloat16(published, form):
    _, params, _ = load_pretrained(published(form), dtype="bfloat16", experts="bfloat16")
    expected = tree_by_hand(load_file(published(form) / "model.safetensors"))
    assert_same_leaves(leaves(params), {name: leaf.astype(BFLOAT16) for name, leaf in expected.items()})


@pytest.mark.parametrize("form", FORMS)
def test_original_layout_gives_the_same_parameters(published, original, form):
    config, params, origin = load_pretrained(original(form))
    expected_config, expected, _ = load_pretrained(published(form))
    assert config == expected_config and origin == original(form) / "original"
    assert_same_leaves(leaves(params), leaves(expected))
    # The folder itself can be named too.
    _, params, _ = load_pretrained(original(form) / "original")
    assert_same_leaves(leaves(params), leaves(expected))


def test_packed_experts_keep_the_files_bytes(published):
    theirs = load_file(published("mxfp4") / "model.safetensors")
    found = leaves(get_params(from_pretrained(published("mxfp4"))))
    for place, row, layer in ((0, 0, 0), (1, 0, 1), (0, 1, 2), (1, 1, 3)):
        for part in ("blocks", "scales"):
            tensor = theirs[f"model.layers.{layer}.mlp.experts.gate_up_proj_{part}"]
            array = found[f"blocks.{place}.moe.gate_up_{part}"][row]
            np.testing.assert_array_equal(array, tensor)
            tensor = theirs[f"model.layers.{layer}.mlp.experts.down_proj_{part}"]
            np.testing.assert_array_equal(found[f"blocks.{place}.moe.down_{part}"][row], tensor)


def test_packed_logits_are_those_of_the_unpacked_weights(published):
    packed = logits(from_pretrained(published("mxfp4"), dtype="float32"))
    plain = logits(from_pretrained(published("mxfp4"), dtype="float32", experts="float32"))
    assert packed.shape == (*TOKENS.shape, SIZES["vocab_size"]) and np.abs(packed).max() > 1
    # Other kernels multiply them: sums are rounded in another order.
    np.testing.assert_allclose(packed, plain, rtol=0, atol=5e-6 * np.abs(plain).max())


@pytest.mark.parametrize("form", ["bfloat16", "float32"])
def test_packing_while_loading(published, form):
    _, params, _ = load_pretrained(published(form), experts="mxfp4")
    expected = {}
    for name, leaf in leaves(load_pretrained(published(form))[1]).items():
        if name.endswith(("gate_up", "down")):
            rows = np.asarray(leaf).swapaxes(2, -1).astype(np.float32)
            # Of gate and up, [layers, E, F, 2, D], the rows take turns.
            parts = codec.pack(rows.reshape(*rows.shape[:2], -1, rows.shape[-1]), xp=np)
            expected |= {f"{name}_blocks": parts[0], f"{name}_scales": parts[1]}
        else:
            expected[name] = leaf
    assert_same_leaves(leaves(params), expected)


TYPES = [
    # The file's form, dtype, experts -> type of all but the experts, type of the experts.
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
def test_types(published, form, dtype, experts, rest, matrices):
    config, params, _ = load_pretrained(published(form), dtype=dtype, experts=experts)
    assert config.compute_dtype == (dtype or "auto")
    assert config.expert_format == ("mxfp4" if matrices == "uint8" else "plain")
    for name, leaf in leaves(params).items():
        expert = re.search(r"moe\.(gate_up|down)(_blocks|_scales)?$", name)
        assert leaf.dtype == (matrices if expert else rest), name


def test_float16_files(copied, tmp_path):
    def narrow(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float16)

    folder = copied("float32", narrow)
    found = leaves(load_pretrained(folder)[1])
    assert {leaf.dtype.name for leaf in found.values()} == {"float16"}
    found = leaves(load_pretrained(folder, dtype="float32")[1])
    assert_same_leaves(found, tree_by_hand(load_file(folder / "model.safetensors")))
    # Packed as the same float32 numbers, and saved as what the format has.
    write_folder(open_weights(folder), tmp_path / "float32", "float32")
    packed = leaves(load_pretrained(folder, "float32", "mxfp4")[1])
    assert_same_leaves(packed, leaves(load_pretrained(tmp_path / "float32", experts="mxfp4")[1]))
    write_folder(open_weights(folder), tmp_path / "new")
    assert {array.dtype.name for array in tensors_of(tmp_path / "new").values()} == {"float32"}


@pytest.fixture(scope="module")
def divisible(tmp_path_factory):
    """(form) -> a folder whose sizes all axes of the mesh divide."""

    @functools.cache
    def make(form):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SIZES, "vocab_size", 212)
            patch.setitem(SIZES, "num_local_experts", 10)
            return random_checkpoint(tmp_path_factory.mktemp(f"divisible-{form}"), 3, form)

    return make


@pytest.mark.parametrize(
    ("form", "experts", "gate_up_shard"),
    [
        ("bfloat16", None, (2, 5, 80, 2, 32)),
        ("mxfp4", None, (2, 5, 32, 5, 16)),
        ("mxfp4", "float32", (2, 5, 80, 2, 32)),
        ("bfloat16", "mxfp4", (2, 5, 32, 5, 16)),
    ],
)
def test_a_mesh_holds_the_same(divisible, form, experts, gate_up_shard):
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    alone = from_pretrained(divisible(form), dtype="float32", experts=experts)
    shared = from_pretrained(divisible(form), dtype="float32", experts=experts, mesh=mesh)
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
def test_on_tpus_arrays_lie_in_memory_as_programs_read_them(divisible, mesh_config, monkeypatch):
    mesh = mesh_config and make_mesh(mesh_config)
    plain = from_pretrained(divisible("mxfp4"), mesh=mesh)
    monkeypatch.setattr(sharded_io, "_platform", lambda sharding: "tpu")
    model = from_pretrained(divisible("mxfp4"), mesh=mesh)
    expected, orders = leaves(get_params(plain)), {}
    for name, array in leaves(get_params(model)).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
        assert array.sharding == expected[name].sharding
        orders[name.removeprefix("blocks.0.")] = array.format.layout.major_to_minor
    # [layers, experts, outputs, groups, bytes] and [layers, experts, outputs, groups]: outputs innermost.
    assert orders["moe.gate_up_blocks"] == orders["moe.down_blocks"] == (0, 1, 3, 4, 2)
    assert orders["moe.gate_up_scales"] == orders["moe.down_scales"] == (0, 1, 3, 2)
    assert orders["embedding.weight"] == (0, 1) and orders["attention.q"] == (0, 1, 2, 3)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        np.testing.assert_array_equal(logits(model), logits(plain))


def test_a_mesh_that_does_not_divide_is_refused(published):
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    with pytest.raises(ValueError, match=r"mesh\.\w+ is 2: must divide (211|7), a size of \w+\.\w+"):
        from_pretrained(published("mxfp4"), mesh=mesh)


# What is refused, and what is warned of.


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message, message
    return message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "float16"}, "dtype is 'float16': must be bfloat16, float32 or None"),
        ({"experts": "int8"}, "experts is 'int8': must be bfloat16, float32, mxfp4 or None"),
    ],
)
def test_bad_choices(published, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        from_pretrained(published("mxfp4"), **arguments)
    one_line(caught)
    if "experts" in arguments:
        with pytest.raises(ValueError, match=words):
            save_pretrained(from_pretrained(published("mxfp4")), tmp_path / "new", **arguments)
        assert not (tmp_path / "new").exists()


def test_all_tensors_that_do_not_fit_are_named_at_once(copied):
    def change(tensors):
        del tensors[LAYER_2 + "mlp.router.bias"]
        tensors[LAYER_2 + "self_attn.rotary.inv_freq"] = np.ones(3, np.float32)
        tensors[LAYER_2 + "self_attn.o_proj.weight"] = tensors[LAYER_2 + "self_attn.o_proj.weight"].T.copy()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
        tensors[LAYER_2 + "mlp.experts.down_proj_scales"] = np.ones((7, 160, 2), np.float32)

    folder = copied("mxfp4", change)
    with pytest.raises(ValueError) as caught:
        from_pretrained(folder)
    message = one_line(caught)
    assert message.startswith(f"{folder}: 5 tensors")
    for words in (
        f"{LAYER_2}mlp.router.bias is missing",
        f"{LAYER_2}self_attn.rotary.inv_freq is not of this model",
        f"{LAYER_2}self_attn.o_proj.weight is [96, 160], must be [160, 96]",
        "model.norm.weight is of type float64, must be bfloat16 or float16 or float32",
        f"{LAYER_2}mlp.experts.down_proj_scales is of type float32, must be uint8",
    ):
        assert words in message, message


def test_a_config_of_another_size_names_the_first_of_many(published, copied):
    folder = copied("bfloat16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": 32}))
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.weight is \[96, 160\], must be \[192, 160\]"):
        from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 192}))
    with pytest.raises(ValueError, match="and [0-9]+ more$") as caught:
        from_pretrained(folder)
    assert len(one_line(caught)) < 3000


def warned(action):
    """What the action returns, and the one warning that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    messages = [str(one.message) for one in caught if "finite" in str(one.message)]
    assert len(messages) == 1 and "\n" not in messages[0], [str(one.message) for one in caught]
    return result, messages[0]


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
def test_what_is_not_finite_is_warned_of(copied, form, name, value, experts, tmp_path):
    def change(tensors):
        tensors[LAYER_2 + name].reshape(-1)[-3] = value

    folder = copied(form, change)
    model, message = warned(lambda: from_pretrained(folder, experts=experts))
    found = re.findall(r"model\.[\w.]+\w", message.removeprefix(str(folder)))
    stem = re.sub("_(scales|blocks)$", "", LAYER_2 + name)
    assert len(found) == 1 and found[0].startswith(stem) and str(folder) in message, message
    # It is written as it is, and warned of again.
    _, message = warned(lambda: save_pretrained(model, tmp_path / "again"))
    assert stem in message
    if experts is None:
        assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(folder))


@pytest.mark.parametrize("form", FORMS)
def test_sound_weights_give_no_warning(published, tmp_path, form):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_pretrained(from_pretrained(published(form)), tmp_path / "new")
    assert [str(one.message) for one in caught] == []
    assert (tmp_path / "new" / "config.json").is_file()


def test_overflow_of_the_largest_codes_is_warned_of(copied):
    def change(tensors):
        tensors[LAYER_2 + "mlp.experts.down_proj_scales"][3, 5, 1] = 254
        tensors[LAYER_2 + "mlp.experts.down_proj_blocks"][3, 5, 1, 0] = 0x72

    model, message = warned(lambda: from_pretrained(copied("mxfp4", change), experts="bfloat16"))
    assert LAYER_2 + "mlp.experts.down_proj" in message
    # Expert 3, inputs 32 and 33 (codes 2 and 7), output 5.
    found = np.asarray(get_params(model)["blocks"]["0"]["moe"]["down"][1, 3, 32:34, 5], np.float32)
    assert found.tolist() == [2.0**127, np.inf]


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder") as caught:
        from_pretrained(tmp_path / "nowhere")
    one_line(caught)
    with pytest.raises(ValueError, match="openai/gpt-oss-99b: no such folder; hf:openai/gpt-oss-99b would"):
        from_pretrained("openai/gpt-oss-99b")
    with pytest.raises(ValueError, match="neither config.json nor original/config.json") as caught:
        from_pretrained(tmp_path)
    one_line(caught)
    random_checkpoint(tmp_path / "bare", 3, "bfloat16")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="bare: holds no .safetensors file"):
        from_pretrained(tmp_path / "bare")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_model_of_the_hub_that_is_not_cached(hub):
    with pytest.raises(ValueError, match="hf:some/model: cannot be fetched") as caught:
        from_pretrained("hf:some/model")
    assert len(one_line(caught)) < 600
    with pytest.raises(ValueError, match="hf:not a name: cannot be fetched"):
        from_pretrained("hf:not a name")


def test_a_model_of_the_hubs_cache(hub, published):
    repository = hub / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123456789abcdef")
    shutil.copytree(published("mxfp4"), repository / "snapshots" / "0123456789abcdef")
    _, params, origin = load_pretrained("hf:some/model")
    assert origin == repository / "snapshots" / "0123456789abcdef"
    assert_same_leaves(leaves(params), leaves(load_pretrained(published("mxfp4"))[1]))


# Saving.


@pytest.mark.parametrize("form", FORMS)
def test_round_trips_byte_for_byte(published, tmp_path, form):
    save_pretrained(from_pretrained(published(form)), tmp_path / "new")
    assert_same_tensors(tensors_of(tmp_path / "new"), tensors_of(published(form)))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    assert ModelConfig.from_hf(tmp_path / "new") == ModelConfig.from_hf(published(form))
    values = json.loads((tmp_path / "new" / "config.json").read_text())
    assert ("quantization_config" in values) == (form == "mxfp4")
    assert values["torch_dtype"] == ("float32" if form == "float32" else "bfloat16")


@pytest.mark.parametrize("form", FORMS)
def test_original_layout_is_written_as_hugging_face(published, original, tmp_path, form):
    save_pretrained(from_pretrained(original(form)), tmp_path / "model")
    assert_same_tensors(tensors_of(tmp_path / "model"), tensors_of(published(form)))
    # Without a model in between, too.
    heard = []
    write_folder(
        open_weights(original(form)),
        tmp_path / "files",
        on_progress=lambda done, total: heard.append((done, total)),
    )
    assert_same_tensors(tensors_of(tmp_path / "files"), tensors_of(published(form)))
    total = sum(array.nbytes for array in tensors_of(published(form)).values())
    assert heard[-1] == (total, total) and [done for done, _ in heard] == sorted(done for done, _ in heard)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("experts", FORMS)
def test_every_form_into_every_other(published, tmp_path, form, experts):
    write_folder(open_weights(published(form)), tmp_path / "files", experts)
    save_pretrained(from_pretrained(published(form)), tmp_path / "model", experts)
    found, theirs = tensors_of(tmp_path / "files"), tensors_of(published(form))
    assert_same_tensors(tensors_of(tmp_path / "model"), found)
    expected = {}
    rest = np.float32 if experts == "float32" else BFLOAT16
    for name, array in theirs.items():
        if name.endswith("_scales") or name.endswith("_blocks"):
            if experts == "mxfp4":
                expected[name] = array
            elif name.endswith("_blocks"):
                values = dequantised(array, theirs[name.replace("_blocks", "_scales")])
                expected[name.removesuffix("_blocks")] = np.ascontiguousarray(values.swapaxes(1, 2)).astype(
                    rest
                )
        elif experts == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            values = np.ascontiguousarray(array.swapaxes(1, 2)).astype(np.float32)
            expected[f"{name}_blocks"], expected[f"{name}_scales"] = codec.pack(values, xp=np)
        else:
            expected[name] = array.astype(rest)
    assert_same_tensors(found, expected)


@pytest.mark.parametrize("form", ["bfloat16", "mxfp4"])
@pytest.mark.parametrize("experts", ["bfloat16", "mxfp4"])
def test_a_mesh_is_written_as_one_device_is(divisible, tmp_path, form, experts):
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    save_pretrained(from_pretrained(divisible(form), mesh=mesh), tmp_path / "mesh", experts)
    write_folder(open_weights(divisible(form)), tmp_path / "one", experts)
    assert_same_tensors(tensors_of(tmp_path / "mesh"), tensors_of(tmp_path / "one"))


def test_shards(published, tmp_path):
    save_pretrained(from_pretrained(published("mxfp4")), tmp_path / "new", shard_bytes=200_000)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    expected = tensors_of(published("mxfp4"))
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    files = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3
    assert_same_tensors(tensors_of(tmp_path / "new"), expected)
    again = leaves(load_pretrained(tmp_path / "new")[1])
    assert_same_leaves(again, leaves(load_pretrained(published("mxfp4"))[1]))


@pytest.fixture(scope="module")
def bare_config(tiny_config):
    """A model without what the published format always has, and with tied embeddings."""
    return dataclasses.replace(
        tiny_config,
        attention_bias=False,
        expert_bias=False,
        router_bias=False,
        learned_sinks=False,
        tie_word_embeddings=True,
    )


@pytest.mark.parametrize("experts", ["float32", "bfloat16"])
def test_what_a_model_lacks_is_written_as_what_does_nothing(bare_config, random_params, tmp_path, experts):
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


def test_what_cannot_be_expressed_is_refused(notebook_config, random_params, tmp_path):
    model = bind(notebook_config, random_params(notebook_config))
    with pytest.raises(ValueError) as caught:
        save_pretrained(model, tmp_path / "new", "mxfp4")
    message = one_line(caught)
    for words in ("sink_tokens is 2", "swiglu_up_offset is 0.0", "swiglu_limit is None", "hidden_size is 26"):
        assert words in message
    assert list(tmp_path.iterdir()) == []


def test_a_target_with_content_is_left_alone(published, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("content")
    with pytest.raises(ValueError, match="taken: exists already") as caught:
        save_pretrained(from_pretrained(published("mxfp4")), tmp_path / "taken")
    one_line(caught)
    # Its own folder least of all.
    folder = shutil.copytree(published("mxfp4"), tmp_path / "model")
    with pytest.raises(ValueError, match="exists already"):
        save_pretrained(from_pretrained(folder), folder)
    assert_same_tensors(tensors_of(folder), tensors_of(published("mxfp4")))
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent.name != "model") == [
        "model", "precious", "taken",
    ]  # fmt: skip


SIDECAR_FILES = [
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def with_companions(folder):
    for name in SIDECAR_FILES:
        (folder / name).write_text(json.dumps({"file": name, "bos_token_id": 198}))
    (folder / "notes.txt").write_text("not of the model")
    return folder


def test_companions_are_copied(copied, tmp_path):
    folder = with_companions(copied("mxfp4"))
    save_pretrained(from_pretrained(folder), tmp_path / "new")
    found = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert found == sorted([*SIDECAR_FILES, "config.json", "model.safetensors"])
    for name in SIDECAR_FILES:
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes()
    # config.json says nothing of tokens here, so what generation_config.json says stands.
    assert json.loads((tmp_path / "new" / "config.json").read_text())["bos_token_id"] == 198


def test_companions_of_original_lie_above_it(original, tmp_path):
    folder = with_companions(shutil.copytree(original("bfloat16"), tmp_path / "folder"))
    save_pretrained(from_pretrained(folder), tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} >= set(SIDECAR_FILES)
    assert not (tmp_path / "new" / "notes.txt").exists()


def test_token_ids_of_config_json_are_kept(copied, tmp_path):
    folder = with_companions(copied("mxfp4"))
    config = json.loads((folder / "config.json").read_text())
    ids = {"eos_token_id": [7, 9], "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config | ids))
    save_pretrained(from_pretrained(folder), tmp_path / "new")
    found = json.loads((tmp_path / "new" / "config.json").read_text())
    assert {name: value for name, value in found.items() if name.endswith("_token_id")} == ids


def test_another_folders_tokenizer(published, copied, tmp_path):
    folder = with_companions(copied("mxfp4"))
    save_pretrained(from_pretrained(published("bfloat16")), tmp_path / "new", tokenizer=folder)
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_is_named_must_be_there(published, tmp_path):
    with pytest.raises(ValueError, match="nowhere") as caught:
        save_pretrained(from_pretrained(published("mxfp4")), tmp_path / "new", tokenizer=tmp_path / "nowhere")
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run_folder(tiny_config, tmp_path_factory):
    """A run folder as train.py leaves it: config, tokenizer, one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    model = dataclasses.replace(tiny_config, vocab_size=257)
    TrainConfig(model=model, data=DataConfig(seq_len=64), run_dir=str(folder)).save(folder / "config.json")
    make_tokenizer("bytes").save(folder)
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, init_params(model, jax.random.key(0)), {"step": jnp.array(3)}, {"step": 3})
    checkpoints.close()
    return folder


def test_a_run_folder_is_written_with_its_tokenizer(run_folder, tmp_path):
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
    # The published folder's own tokenizer goes with the next one.
    save_pretrained(again, tmp_path / "third")
    assert load_tokenizer(tmp_path / "third").same_ids_as(make_tokenizer("bytes"))
    assert_same_tensors(tensors_of(tmp_path / "third"), tensors_of(tmp_path / "new"))


def test_a_run_folder_in_another_type(run_folder):
    model = from_pretrained(run_folder, dtype="bfloat16")
    exact = leaves(get_params(from_pretrained(run_folder)))
    assert model.config.compute_dtype == "bfloat16"
    assert_same_leaves(
        leaves(get_params(model)), {name: np.asarray(leaf).astype(BFLOAT16) for name, leaf in exact.items()}
    )


# Memory.


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with packed experts that are some 60 MB in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"hidden_size": 1024, "intermediate_size": 512, "num_local_experts": 5}.items():
            patch.setitem(SIZES, name, size)
        return random_checkpoint(tmp_path_factory.mktemp("large"), 3, "mxfp4")


@contextlib.contextmanager
def traced_peak():
    """A list that gets the most bytes that numpy held at once above what it held before."""
    found = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("experts", "dtype"), [(None, None), ("bfloat16", None), ("float32", "float32")])
def test_loading_holds_less_than_half_a_tensor_besides_the_result(large, monkeypatch, experts, dtype):
    # Each thread holds a few MB of its own, however many there are.
    monkeypatch.setattr(sharded_io.os, "sched_getaffinity", lambda process: {0, 1})
    load_pretrained(large, dtype, experts)
    with traced_peak() as peak:
        _, params, _ = load_pretrained(large, dtype, experts)
    arrays = leaves(params)
    total = sum(array.nbytes for array in arrays.values())
    one = max(array.nbytes // len(array) for name, array in arrays.items() if "moe" in name)
    # The peak would be below the total if numpy's memory were not what the arrays lie in.
    assert total <= peak[0] < total + one / 2


def test_a_device_with_memory_of_its_own_is_filled_layer_by_layer(published):
    # What a GPU or TPU gets; on CPU the host's array becomes the device's.
    source = open_weights(published("mxfp4"))
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


def test_a_slice_of_a_sharded_layer_gathers_nothing(divisible):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    gate_up = leaves(load_pretrained(divisible("float32"), mesh=mesh)[1])["blocks.1.moe.gate_up"]
    np.testing.assert_array_equal(sharded_io.layer_on_host(gate_up, 1), np.asarray(gate_up)[1])
    head = leaves(load_pretrained(divisible("float32"), mesh=mesh)[1])["head.weight"]
    np.testing.assert_array_equal(sharded_io.layer_on_host(head, None), np.asarray(head))


def test_other_files_beside_the_model_are_let_be(copied):
    folder = copied("bfloat16")
    save_file({"lora": np.zeros(3, np.float32)}, folder / "adapter_model.safetensors")
    assert open_weights(folder).config.hidden_size == SIZES["hidden_size"]


def test_a_link_to_nowhere(copied):
    folder = copied("bfloat16")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(ValueError, match="model.safetensors links to a file that is not there") as caught:
        open_weights(folder)
    one_line(caught)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_in_a_file_of_a_tied_model(copied, same):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(not same)

    folder = copied("float32", change)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    if same:
        assert "head" not in load_pretrained(folder)[1]
    else:
        with pytest.raises(ValueError, match="tie_word_embeddings is true, but the head is not"):
            open_weights(folder)


def test_a_type_that_only_some_layers_have(copied, tmp_path):
    router = "model.layers.3.mlp.router.weight"

    def change(tensors):
        tensors[router] = np.random.default_rng(0).standard_normal(tensors[router].shape).astype(np.float32)

    folder = copied("bfloat16", change)
    model = from_pretrained(folder)
    found = np.asarray(model.blocks[1].moe.router[...])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[1].T, load_file(folder / "model.safetensors")[router])
    save_pretrained(model, tmp_path / "new")
    assert tensors_of(tmp_path / "new")[router].dtype == np.float32


def test_a_run_that_holds_a_nan_is_warned_of(run_folder, tiny_config, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    params = init_params(TrainConfig.load(folder / "config.json").model, jax.random.key(0))
    params["blocks"]["1"]["moe"]["router"] = params["blocks"]["1"]["moe"]["router"].at[1, 2, 3].set(jnp.nan)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, params, {"step": jnp.array(1)}, {"step": 1})
    checkpoints.close()
    _, message = warned(lambda: from_pretrained(folder))
    assert message.endswith("contains NaN or infinite values in model.layers.3.mlp.router.weight")


def test_a_folder_that_has_gone_since(copied, tmp_path):
    folder = copied("bfloat16")
    model = from_pretrained(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="is gone; name another folder"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_is_not_read_for_a_target_that_is_taken(run_folder, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    monkeypatch.setattr(export, "open_weights", lambda folder: pytest.fail("was read"))
    with pytest.raises(ValueError, match="exists already"):
        convert(run_folder, tmp_path / "taken")
    with pytest.raises(ValueError, match="hidden_size is .* multiples of 32"):
        convert(run_folder, tmp_path / "new", "mxfp4")


def test_a_damaged_companion(copied, tmp_path):
    folder = copied("bfloat16")
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
