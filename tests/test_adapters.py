"""Adapters in PEFT's format: the file element by element, other layouts, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.adapters import FILES, LORA, bfloat16, deltas_by_hand, edit_adapter, random_adapter
from helpers.checkpoints import SIZES
from helpers.weights import assert_same_leaves, leaves, tensors_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gptoss_jax.checkpoints.adapters import open_adapted, read_adapter, write_adapter
from gptoss_jax.checkpoints.export import convert, save_pretrained
from gptoss_jax.checkpoints.load import from_pretrained
from gptoss_jax.checkpoints.merge import merge
from gptoss_jax.config import LoraConfig, ModelConfig
from gptoss_jax.model.transformer import get_params

V, D, F, L = (SIZES[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"))
N, K, H, E = (
    SIZES[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts")
)
P = "base_model.model.model.layers.{}."
EXPERTS = P + "mlp.experts."


@pytest.fixture(scope="module")
def config(hf_folder):
    return ModelConfig.from_hf(hf_folder("float32"))


@pytest.fixture
def written(config, tmp_path):
    """(lora, name) -> a random adapter and the folder it is written to."""

    def make(lora=LORA, name="adapter"):
        adapter = random_adapter(config, lora)
        write_adapter(adapter, config, tmp_path / name, "some/base")
        return adapter, tmp_path / name

    return make


def test_names_shapes_and_elements_of_the_file(written):
    adapter, folder = written()
    found = load_file(folder / FILES[0])
    shapes = {"q": (N * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, N * H)}
    expected = {}
    for layer in range(L):
        for name, (outputs, inputs) in shapes.items():
            expected[f"{P.format(layer)}self_attn.{name}_proj.lora_A.weight"] = (5, inputs)
            expected[f"{P.format(layer)}self_attn.{name}_proj.lora_B.weight"] = (outputs, 5)
        expected[EXPERTS.format(layer) + "base_layer.lora_A.weight"] = (3 * E, D)
        expected[EXPERTS.format(layer) + "base_layer.lora_B.weight"] = (2 * F, 3 * E)
        expected[EXPERTS.format(layer) + "lora_A.weight"] = (3 * E, F)
        expected[EXPERTS.format(layer) + "lora_B.weight"] = (D, 3 * E)
        expected[P.format(layer) + "mlp.router.lora_A.weight"] = (5, D)
        expected[P.format(layer) + "mlp.router.lora_B.weight"] = (E, 5)
    expected |= {
        "base_model.model.lm_head.lora_A.weight": (5, D),
        "base_model.model.lm_head.lora_B.weight": (V, 5),
    }
    assert {name: array.shape for name, array in found.items()} == expected
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    with safe_open(folder / FILES[0], "np") as file:
        assert file.metadata() == {"format": "pt"}

    def ours(key, layer=2):
        return adapter.tensors[key, layer].array

    def theirs(name):
        return found[P.format(2) + name + ".weight"]

    e, d, k, f, p, n, h = 4, 33, 2, 11, 1, 5, 13
    assert theirs("mlp.experts.base_layer.lora_A")[e * 3 + k, d] == ours("moe.gate_up_lora_a")[e, d, k]
    # Gate and up alternate, and the columns run over ranks first.
    assert (
        theirs("mlp.experts.base_layer.lora_B")[2 * f + p, k * E + e]
        == ours("moe.gate_up_lora_b")[e, k, p, f]
    )
    assert theirs("mlp.experts.lora_A")[e * 3 + k, f] == ours("moe.down_lora_a")[e, f, k]
    assert theirs("mlp.experts.lora_B")[d, k * E + e] == ours("moe.down_lora_b")[e, k, d]
    assert theirs("self_attn.q_proj.lora_A")[k, d] == ours("attention.q_lora_a")[d, k]
    assert theirs("self_attn.q_proj.lora_B")[n * H + h, k] == ours("attention.q_lora_b")[k, n, h]
    assert theirs("self_attn.o_proj.lora_A")[k, n * H + h] == ours("attention.out_lora_a")[n, h, k]
    assert theirs("self_attn.o_proj.lora_B")[d, k] == ours("attention.out_lora_b")[k, d]
    assert theirs("mlp.router.lora_B")[e, k] == ours("moe.router_lora_b")[k, e]
    assert found["base_model.model.lm_head.lora_B.weight"][d, k] == ours("head.lora_b", -1)[d, k]


def test_config_of_the_file(written):
    _, folder = written()
    found = json.loads((folder / FILES[1]).read_text())
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert found["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
    assert found["target_parameters"] == [*experts, "mlp.router.weight"]
    assert (found["r"], found["rank_pattern"]) == (5, dict.fromkeys(experts, 3))
    assert (found["lora_alpha"], found["alpha_pattern"]) == (7, dict.fromkeys(experts, 7))
    assert (found["peft_type"], found["base_model_name_or_path"]) == ("LORA", "some/base")
    assert (found["bias"], found["lora_dropout"], found["use_rslora"]) == ("none", 0.0, False)
    _, folder = written(
        LoraConfig(rank=4, expert_rank=4, alpha=0.5, rslora=True, targets=("q", "down")), "same"
    )
    found = json.loads((folder / FILES[1]).read_text())
    assert (found["r"], found["rank_pattern"], found["alpha_pattern"]) == (4, {}, {})
    assert (found["lora_alpha"], found["use_rslora"]) == (0.5, True)
    assert (found["target_modules"], found["target_parameters"]) == (["q_proj"], experts)


def test_both_expert_pairs_are_written(written):
    adapter, folder = written(LoraConfig(rank=4, expert_rank=2, targets=("down",)))
    found = load_file(folder / FILES[0])
    assert found[EXPERTS.format(1) + "base_layer.lora_A.weight"].shape == (2 * E, D)
    assert found[EXPERTS.format(1) + "base_layer.lora_B.weight"].shape == (2 * F, 2 * E)
    assert not any(array.any() for name, array in found.items() if ".base_layer." in name)
    assert all(array.any() for name, array in found.items() if ".base_layer." not in name)


def assert_same_adapters(found, expected):
    assert found.tensors.keys() == expected.tensors.keys()
    for place, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[place].array, tensor.array, err_msg=str(place))


def test_round_trip(written, config):
    for i, lora in enumerate((LORA, LoraConfig(alpha=3.5, rslora=True, expert_rank=8))):
        adapter, folder = written(lora, str(i))
        again = read_adapter(folder, config)
        assert again.lora == lora
        assert_same_adapters(again, adapter)


# Layouts that other programs write, from the standard one.


def swapped(tensors, config):
    """PEFT with transformers 4: A is on the side of the outputs, B on that of the inputs."""

    def expert_major(array):
        return array.reshape(len(array), -1, E).transpose(2, 1, 0).reshape(-1, len(array))

    def rank_major(array):
        return array.reshape(E, -1, array.shape[1]).transpose(2, 1, 0).reshape(array.shape[1], -1)

    new = dict(tensors)
    for name, array in tensors.items():
        if ".experts." in name and "lora_A" in name:
            b = tensors[name.replace("lora_A", "lora_B")]
            new[name], new[name.replace("lora_A", "lora_B")] = expert_major(b), rank_major(array)
    return new


def per_expert(tensors, config):
    new = {}
    for name, array in tensors.items():
        if ".experts." not in name:
            new[name] = array
            continue
        module = "gate_up_projs" if ".base_layer." in name else "down_projs"
        stem, end = name.split("base_layer." if ".base_layer." in name else "experts.")
        stem = stem if stem.endswith("experts.") else f"{stem}experts."
        for e in range(E):
            part = array.reshape(E, -1, array.shape[1])[e] if "lora_A" in end else array[:, e::E]
            new[f"{stem}{module}.{e}.{end}"] = part
    return new


def grouped_by_expert(tensors, config):
    config["lora_B_layout"] = "grouped_by_expert"
    return {
        name: array.reshape(len(array), -1, E).swapaxes(1, 2).reshape(array.shape)
        if ".experts." in name and "lora_B" in name
        else array
        for name, array in tensors.items()
    }


def rank_major(tensors, config):
    config |= {"lora_B_layout": "rank_major", "auto_mapping": {"unsloth_fixed": True}}


def wrapped_names(tensors, config):
    return {name.replace(".weight", ".default.weight"): array for name, array in tensors.items()}


def swapped_and_grouped(tensors, config):
    return grouped_by_expert(swapped(tensors, config), config)


LAYOUTS = [swapped, per_expert, grouped_by_expert, rank_major, wrapped_names, swapped_and_grouped]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_other_layouts(written, config, layout):
    adapter, folder = written()
    again = read_adapter(edit_adapter(folder, layout), config)
    assert again.lora == LORA
    assert_same_adapters(again, adapter)


@pytest.mark.parametrize("target", ["gate_up", "down"])
@pytest.mark.parametrize("is_named", [True, False])
def test_one_expert_pair_has_no_inner_wrapper(written, config, target, is_named):
    adapter, folder = written(LoraConfig(rank=2, expert_rank=2, targets=(target,)))

    def outer_only(tensors, config):
        config["target_parameters"] = [f"mlp.experts.{target}_proj"] if is_named else []
        inner = target == "gate_up"
        return {
            name.replace(".base_layer.", "."): array
            for name, array in tensors.items()
            if (".base_layer." in name) == inner
        }

    again = read_adapter(edit_adapter(folder, outer_only), config)
    assert again.lora.targets == (target,)
    assert_same_adapters(again, adapter)


def test_bfloat16_tensors(written, config):
    adapter, folder = written()
    again = read_adapter(edit_adapter(folder, lambda tensors, config: bfloat16(tensors)), config)
    for place, tensor in adapter.tensors.items():
        rounded = bfloat16({"": tensor.array})[""]
        np.testing.assert_array_equal(again.tensors[place].array, rounded, err_msg=str(place))


def test_layers_ranks_and_scalings_of_their_own(written, config, hf_folder, tmp_path):
    """Some layers only, other ranks and other scalings give the deltas of the file."""
    _, folder = written(LoraConfig(rank=4, expert_rank=2, alpha=6.0, targets=("q", "v", "gate_up", "down")))

    def edit(tensors, config):
        config["layers_to_transform"] = [1, 2, 3]
        config["target_parameters"] = ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]
        config["rank_pattern"] |= {"2.self_attn.q_proj": 3}
        config["alpha_pattern"] |= {"v_proj": 10, "mlp.experts.gate_up_proj": 3}
        return {
            name: array[:3] if "2.self_attn.q_proj.lora_A" in name
            else array[:, :3] if "2.self_attn.q_proj.lora_B" in name
            else array
            for name, array in tensors.items()
            if ".0." not in name and (".experts." not in name or "layers.1." in name)
        }  # fmt: skip

    adapter = read_adapter(edit_adapter(folder, edit), config)
    assert (adapter.lora.rank, adapter.lora.expert_rank) == (4, 2)
    assert not adapter.tensors["attention.q_lora_b", 0].array.any()
    assert not adapter.tensors["moe.down_lora_a", 3].array.any()
    merge(hf_folder("float32"), tmp_path / "merged", folder)
    before, after = tensors_of(hf_folder("float32")), tensors_of(tmp_path / "merged")
    changed = {name for name in before if (before[name] != after[name]).any()}
    expected = deltas_by_hand(folder, E)
    assert changed == expected.keys()
    for name, delta in expected.items():
        factor = 1.0
        if ".v_proj." in name:
            factor = 10 / 6
        elif "gate_up" in name:
            factor = 3 / 6
        np.testing.assert_allclose(after[name] - before[name], factor * delta, atol=2e-6, err_msg=name)


def test_modules_that_are_named_and_left_out(written, config):
    """What PEFT does not adapt need not be in the file."""
    lora = LoraConfig(rank=4, targets=("q", "v", "out"))
    _, folder = written(lora)
    expected = read_adapter(folder, config)
    for settings in (
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "lm_head"]},
        {"target_modules": "All-Linear", "exclude_modules": r".*\.k_proj"},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "exclude_modules": ["self_attn.k_proj"]},
        {"target_modules": r".*\.(q|v|o)_proj", "exclude_modules": []},
    ):
        found = read_adapter(edit_adapter(folder, lambda t, c, new=settings: c.update(new)), config)
        assert_same_adapters(found, expected)
    for excluded in ("k_proj", ["proj"], None):
        edit_adapter(
            folder, lambda t, c, new=excluded: c.update(target_modules="all-linear", exclude_modules=new)
        )
        with pytest.raises(ValueError, match="self_attn.k_proj.lora_A.weight is missing"):
            read_adapter(folder, config)


def test_layers_of_modules_but_not_of_parameters(written, config):
    _, folder = written(LoraConfig(rank=4, targets=("q", "router")))

    def edit(tensors, config):
        config |= {"layers_to_transform": 2, "target_modules": ["q_proj", "model.layers.0.self_attn.q_proj"]}
        return {name: array for name, array in tensors.items() if ".1." not in name and ".3." not in name}

    with pytest.raises(ValueError, match=r" 4 tensors do not fit: model.layers.1.mlp.router") as caught:
        read_adapter(edit_adapter(folder, edit), config)
    assert "q_proj" not in str(caught.value)


REFUSALS = {
    "rank": (lambda t, c: c.update(r=8), r"q_proj.lora_A.weight has shape \[5, 160\], expected \[8, 160\]"),
    "expert rank": (
        lambda t, c: c.update(rank_pattern={}),
        r"lora_A.weight has shape \[21, 160\], expected \[35, 160\]",
    ),
    "other model": (
        lambda t, c: {name: array[:, :96] if array.shape[1] == D else array for name, array in t.items()},
        r"q_proj.lora_A.weight has shape \[5, 96\], expected \[5, 160\]",
    ),
    "missing": (
        lambda t, c: {name: array for name, array in t.items() if "3.self_attn.v_proj.lora_B" not in name},
        r"1 tensors do not fit: model.layers.3.self_attn.v_proj.lora_B.weight is missing$",
    ),
    "missing layer": (
        lambda t, c: {name: array for name, array in t.items() if "layers.3.self_attn.v_proj" not in name},
        r"2 tensors do not fit: .*v_proj.lora_A.weight is missing; .*v_proj.lora_B.weight is missing$",
    ),
    "unexpected": (
        lambda t, c: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": t.popitem()[1]},
        "model.embed_tokens.lora_embedding_A is not part of this model, or not a LoRA tensor",
    ),
    "tinker": (
        lambda t, c: {name.replace("experts.lora", "experts.w2.lora"): array for name, array in t.items()},
        "Tinker's layout with shared expert matrices",
    ),
    "unsloth": (
        lambda t, c: c.update(auto_mapping={"unsloth_fixed": True}),
        "lora_B_layout is None: must be 'rank_major', or 'grouped_by_expert' for an adapter trained by",
    ),
    "dora": (lambda t, c: c.update(use_dora=True), "adapter_config.json: use_dora is True: must be False"),
    "bias": (lambda t, c: c.update(bias="all"), "bias is 'all': must be 'none'"),
    "modules": (
        lambda t, c: c.update(modules_to_save=["lm_head"]),
        r"modules_to_save is \['lm_head'\]: must be",
    ),
    "kind": (lambda t, c: c.update(peft_type="IA3"), "peft_type is 'IA3': must be 'LORA'"),
    "pissa": (
        lambda t, c: c.update(init_lora_weights="pissa_niter_4"),
        "the adapter is for modified base weights",
    ),
    "alpha": (lambda t, c: c.update(lora_alpha=None), "lora_alpha is None: must be a finite number above 0"),
    "rank 5.0": (lambda t, c: c.update(r=5.0), f"/{FILES[1]}: r is 5.0: must be an integer above 0"),
    "pattern": (
        lambda t, c: c.update(rank_pattern={"*.q_proj": 4}),
        rf"/{FILES[1]}: rank_pattern is '\*.q_proj': not a regular expression \(",
    ),
    "target pattern": (
        lambda t, c: c.update(target_modules="("),
        rf"/{FILES[1]}: target_modules is '\(': not a regular expression \(",
    ),
    "list of patterns": (
        lambda t, c: c.update(rank_pattern=["q_proj"]),
        rf"/{FILES[1]}: rank_pattern is \['q_proj'\]: must be a JSON object",
    ),
    "rank of a pattern": (
        lambda t, c: c["rank_pattern"].update(q_proj="5"),
        rf"/{FILES[1]}: rank_pattern\['q_proj'\] is '5': must be an integer above 0",
    ),
    "alpha of a pattern": (
        lambda t, c: c["alpha_pattern"].update(q_proj=None),
        rf"/{FILES[1]}: alpha_pattern\['q_proj'\] is None: must be a finite number above 0",
    ),
    "text as alpha of a pattern": (
        lambda t, c: c["alpha_pattern"].update(q_proj="all"),
        rf"/{FILES[1]}: alpha_pattern\['q_proj'\] is 'all': must be a finite number above 0",
    ),
    "auto mapping": (
        lambda t, c: c.update(auto_mapping="x"),
        f"/{FILES[1]}: auto_mapping is 'x': must be a JSON object or None",
    ),
    "layers": (
        lambda t, c: c.update(layers_to_transform=["1"]),
        rf"/{FILES[1]}: layers_to_transform is \['1'\]: must be a sequence, each item an integer or an",
    ),
    "parameters": (
        lambda t, c: c.update(target_parameters="mlp.experts"),
        f"/{FILES[1]}: target_parameters is 'mlp.experts': must be a sequence, each item text or None",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_adapters_that_are_refused(written, config, name):
    edit, message = REFUSALS[name]
    _, folder = written()
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(edit_adapter(folder, edit), config)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_square_down_alone_is_ambiguous(tmp_path):
    config = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_local_experts=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts_per_tok=2,
    )  # fmt: skip
    lora = LoraConfig(rank=2, expert_rank=2, targets=("down",))
    write_adapter(random_adapter(config, lora), config, tmp_path / "a")

    def outer_only(tensors, config):
        return {name: array for name, array in tensors.items() if ".base_layer." not in name}

    with pytest.raises(ValueError, match="ambiguous layout: only one of gate_up and down is adapted"):
        read_adapter(edit_adapter(tmp_path / "a", outer_only), config)


def test_folders_without_an_adapter(tmp_path, hf_folder, config):
    for name, message in {
        "empty": "adapter_config.json: no such file: must be a PEFT adapter",
        "no weights": "contains no adapter_model.safetensors",
    }.items():
        (tmp_path / name).mkdir()
        if name == "no weights":
            (tmp_path / name / FILES[1]).write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
        with pytest.raises(ValueError, match=message):
            from_pretrained(hf_folder("float32"), adapter=tmp_path / name)
    with pytest.raises(ValueError, match="no such folder"):
        from_pretrained(hf_folder("float32"), adapter=tmp_path / "none")
    (tmp_path / "nothing").mkdir()
    save_file({}, tmp_path / "nothing" / FILES[0])
    (tmp_path / "nothing" / FILES[1]).write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    with pytest.raises(ValueError, match="it adapts nothing"):
        read_adapter(tmp_path / "nothing", config)


@pytest.mark.parametrize("form", ["bfloat16", "mxfp4"])
def test_model_with_an_adapter(written, hf_folder, form):
    """tests/test_merge.py compares its logits with those of the merged model."""
    adapter, folder = written()
    model = from_pretrained(hf_folder(form), adapter=folder)
    assert model.config == dataclasses.replace(from_pretrained(hf_folder(form)).config, lora=LORA)
    found = model.blocks[1].moe.gate_up_lora_a.get_value()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[1], adapter.tensors["moe.gate_up_lora_a", 3].array)
    expected = leaves(get_params(from_pretrained(hf_folder(form))))
    base = {name: leaf for name, leaf in leaves(get_params(model)).items() if "lora" not in name}
    assert_same_leaves(base, expected)


def test_unmerged_adapters_are_not_written_as_models(written, hf_folder, tmp_path):
    _, folder = written()
    model = from_pretrained(hf_folder("float32"), adapter=folder)
    with pytest.raises(
        ValueError, match=r"use gptoss merge to .* gptoss export-adapter to write only the adapter$"
    ):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    # The adapter's folder is no model.
    with pytest.raises(
        ValueError, match=r"an adapter \(LORA\), not a whole model; its base model is some/base"
    ):
        convert(folder, tmp_path / "new")
    with pytest.raises(ValueError, match="has no adapter to merge; name one"):
        merge(hf_folder("float32"), tmp_path / "new")
    reader = open_adapted(hf_folder("float32"), folder)
    assert reader.config.lora == LORA and reader.stored("attention.q", 0).shape == (D, N, H)
