"""Quantization-aware training: what is trained is what is written, and gradients pass the rounding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.bases import base_maker
from helpers.params import assert_close, random_params
from helpers.stories import stories_config
from helpers.weights import dequantized, leaves, logits, tensors_of

from gptoss_jax.checkpoints.adapters import export_adapter
from gptoss_jax.checkpoints.export import convert
from gptoss_jax.checkpoints.load import from_pretrained, load_pretrained
from gptoss_jax.checkpoints.merge import merge
from gptoss_jax.cli import main
from gptoss_jax.config import (
    SLIDING,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from gptoss_jax.config.model import LORA_TARGETS
from gptoss_jax.hardware import Chip
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.model import lora
from gptoss_jax.model.fake_quant import exported_config, exported_params
from gptoss_jax.model.parameters import merge_params, path_names, split_params, tree_bytes
from gptoss_jax.model.transformer import abstract_params, bind, segment_positions
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.planning.estimate import estimate
from gptoss_jax.training.base_weights import check_base
from gptoss_jax.training.loop import train
from gptoss_jax.training.metrics import read_metrics
from gptoss_jax.training.setup import check_init_from
from gptoss_jax.training.state import create_state, place_on_mesh
from gptoss_jax.training.step import make_train_step

B, T, V, D, F, E = 8, 13, 264, 64, 32, 4
MODEL = ModelConfig(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=10, num_local_experts=E, num_experts_per_tok=3, sliding_window=9,
    max_position_embeddings=128, rope_theta=1000.0, rope_scaling=None, initializer_range=0.1,
    layer_types=(SLIDING,) * 2, compute_dtype="float32", expert_fake_quant=True,
)  # fmt: skip
LORA = LoraConfig(rank=4, alpha=8.0, targets=LORA_TARGETS)
TOKENS = np.random.default_rng(0).integers(0, V, (2, 12))
KINDS = {
    "full": MODEL,
    "adapters": dataclasses.replace(MODEL, lora=LORA),
    "adapters on packed experts": dataclasses.replace(MODEL, lora=LORA, expert_format="mxfp4"),
}


def spread(name):
    return 0.3 if name in ("router", "router_bias", "sinks") else 0.1


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """(form) -> a base model in a Hugging Face format, with the tokenizer of bytes."""
    return base_maker(tmp_path_factory.mktemp("base"), dataclasses.replace(MODEL, expert_fake_quant=False))


@pytest.fixture(scope="module")
def trained(base_folder, tmp_path_factory):
    """(kind) -> the config and the final state of a run of four steps."""

    @functools.cache
    def make(kind):
        folder, is_packed = tmp_path_factory.mktemp("runs"), KINDS[kind].expert_format == "mxfp4"
        config = TrainConfig(
            model=KINDS[kind],
            data=stories_config(folder),
            optim=OptimConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant"),
            checkpoint=CheckpointConfig(every=9),
            eval=EvalConfig(every=4, batches=50, sample_tokens=3, prompt="Story"),
            steps=4,
            run_dir=str(folder / "run"),
            init_from=str(base_folder("mxfp4" if is_packed else "float32")),
        )
        return config, train(config)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_run_writes_what_it_computed_with(kind, trained, tmp_path):
    config, state = trained(kind)
    write = convert if config.model.lora is None else merge
    write(config.run_dir, tmp_path / "out")  # in MXFP4, without being told so
    expected = leaves(exported_params(config.model, state.params))
    found = leaves(load_pretrained(tmp_path / "out", dtype="float32", experts="float32")[1])
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    # Training has changed some codes.
    convert(config.init_from, tmp_path / "base", "mxfp4")
    name = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    blocks, before = (tensors_of(tmp_path / folder)[name] for folder in ("out", "base"))
    assert blocks.dtype == np.uint8 and 0 < np.mean(blocks != before) < 0.9
    expected = logits(bind(config.model, state.params), TOKENS)
    np.testing.assert_array_equal(
        logits(from_pretrained(tmp_path / "out", "float32", "float32"), TOKENS), expected
    )
    # Packed kernels add in another order.
    packed = logits(from_pretrained(tmp_path / "out"), TOKENS)
    assert np.abs(packed - expected).max() < 5e-6 * np.abs(expected).max()
    as_loaded = from_pretrained(config.run_dir)
    assert np.abs(logits(as_loaded, TOKENS) - expected).max() < 5e-6 * np.abs(expected).max()
    is_packed = as_loaded.config.expert_format == "mxfp4"
    assert is_packed == (config.model.lora is None) and not as_loaded.config.expert_fake_quant


@pytest.mark.parametrize("kind", KINDS)
def test_eval_of_what_was_written_is_the_held_out_loss(kind, trained, tmp_path, capsys):
    config, _ = trained(kind)
    write = convert if config.model.lora is None else merge
    write(config.run_dir, tmp_path / "out")
    losses = [row["val_loss"] for row in read_metrics(f"{config.run_dir}/metrics.jsonl") if "val_loss" in row]
    assert main.main(["generate", str(tmp_path / "out"), "--prompt", "Story", "--max-new-tokens", "3"]) == 0
    assert "Story" in capsys.readouterr().out
    again = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, expert_fake_quant=False, lora=None, expert_format="plain"),
        init_from=str(tmp_path / "out"),
        run_dir=str(tmp_path / "again"),
        optim=dataclasses.replace(config.optim, learning_rate=1e-30),
        steps=1,
    )
    train(again)
    found = [row["val_loss"] for row in read_metrics(f"{again.run_dir}/metrics.jsonl") if "val_loss" in row]
    assert found[-1] == pytest.approx(losses[-1], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_values_by_hand(kind):
    config, params = KINDS[kind], random_params(KINDS[kind], spread, seed=5)
    found = exported_params(config, params)
    assert exported_config(config) == dataclasses.replace(
        config, lora=None, expert_format="plain", expert_fake_quant=False
    )
    before, after = params["blocks"]["0"], found["blocks"]["0"]
    scaling = LORA.scaling(LORA.rank) if config.lora else 0.0
    query = before["attention"]["q"].astype(np.float64)
    if config.lora:
        a, b = (before["attention"][f"q_{suffix}"].astype(np.float64) for suffix in lora.SUFFIXES)
        query = query + scaling * np.einsum("ldr,lrnh->ldnh", a, b)
    np.testing.assert_array_equal(
        after["attention"]["q"], np.asarray(query, np.float32).astype(jnp.bfloat16).astype(np.float32)
    )
    if kind == "full":
        down = before["moe"]["down"].swapaxes(-1, -2)
        expected = dequantized(*codec.quantize(down, xp=np)).swapaxes(-1, -2)
        np.testing.assert_array_equal(after["moe"]["down"], expected)
        gate_up = np.moveaxis(before["moe"]["gate_up"], 2, -1)  # [L, E, P, F, D]
        expected = np.moveaxis(dequantized(*codec.quantize(gate_up, xp=np)), -1, 2)
        np.testing.assert_array_equal(after["moe"]["gate_up"], expected)


def test_experts_that_are_not_adapted_stay_packed():
    attention = dataclasses.replace(LORA, targets=("q", "out"))
    config = dataclasses.replace(MODEL, lora=attention, expert_format="mxfp4")
    params = random_params(config, spread)
    found = exported_params(config, params)
    assert exported_config(config).expert_format == "mxfp4"
    for name in ("gate_up_blocks", "gate_up_scales", "down_blocks", "down_scales"):
        np.testing.assert_array_equal(found["blocks"]["0"]["moe"][name], params["blocks"]["0"]["moe"][name])


@pytest.mark.parametrize("is_fresh", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_the_rounding(kind, is_fresh):
    """They are those of the unrounded weights: with a linear function of the weights, its coefficients."""
    config, params = KINDS[kind], random_params(KINDS[kind], spread, seed=6)
    if is_fresh:  # B of a new adapter is zero
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * (not path_names(path)[-1].endswith("lora_b")), params
        )
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(exported_params, config), params)
    coefficients = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    is_trained = None if config.lora is None else lora.is_adapter
    learned, frozen = split_params(params, is_trained)

    def value(learned, rounds):
        whole = jax.tree.map(jnp.asarray, merge_params(learned, frozen))
        exported = exported_params(config, whole) if rounds else unrounded(config, whole)
        return sum(jax.tree.leaves(jax.tree.map(lambda c, w: jnp.sum(c * w), coefficients, exported)))

    found, expected = (leaves(jax.grad(value)(learned, rounds)) for rounds in (True, False))
    if is_fresh:
        # A has no gradient until B has changed.
        assert not any(np.any(found.pop(name)) for name in [*found] if name.endswith("lora_a"))
        expected = {name: expected[name] for name in found}
    assert_close(found, expected, 1e-6)


def unrounded(config, params):
    """The same weights by other means: the model's own formula for each, without rounding."""
    found = jax.tree.map(lambda leaf: leaf, params)
    block = {name: dict(part) for name, part in found["blocks"]["0"].items()}
    moe = block["moe"]
    for name in ("gate_up", "down"):
        if f"{name}_blocks" in moe:
            rows = codec.dequantize(moe.pop(f"{name}_blocks"), moe.pop(f"{name}_scales"), jnp.float32)
            if name == "gate_up":
                rows = rows.reshape(*rows.shape[:2], F, 2, D).transpose(0, 1, 4, 3, 2)
            moe[name] = rows if name == "gate_up" else rows.swapaxes(-1, -2)
    equations = {
        "q": "ldr,lrnh->ldnh", "k": "ldr,lrnh->ldnh", "v": "ldr,lrnh->ldnh", "out": "lnhr,lrd->lnhd",
        "router": "ldr,lre->lde", "gate_up": "ledr,lerpf->ledpf", "down": "lefr,lerd->lefd",
    }  # fmt: skip
    for part in block.values():
        for name in [name for name in equations if f"{name}_lora_a" in part]:
            a, b = part.pop(f"{name}_lora_a"), part.pop(f"{name}_lora_b")
            rank = config.lora_rank(name)
            part[name] = part[name] + LORA.scaling(rank) * jnp.einsum(equations[name], a, b)
    head = dict(found["head"])
    if "lora_a" in head:
        a, b = head.pop("lora_a"), head.pop("lora_b")
        head["weight"] = head["weight"] + LORA.scaling(LORA.rank) * jnp.einsum("dr,vr->vd", a, b)
    return found | {"blocks": {"0": block}, "head": head}


MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2 x expert 4": MeshConfig(data=2, expert=4),
    "data 4 x tensor 2": MeshConfig(data=4, tensor=2),
    "fsdp 2 x expert 2 x tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}


def run_on(mesh_config, kind):
    """Returns the losses of two steps, and the gradient of the first."""
    model = KINDS[kind]
    config = TrainConfig(
        model=model,
        data=DataConfig(seq_len=T, batch_size=B),
        # With a large epsilon, updates are proportional to gradients, so wrong gradients show.
        optim=OptimConfig(learning_rate=5e-3, warmup_steps=0, epsilon=0.05, max_grad_norm=0.0),
        steps=20,
    )
    mesh = make_mesh(mesh_config or MeshConfig(data=1), None if mesh_config else jax.devices()[:1])
    places = jax.tree.map(lambda leaf: leaf.sharding, place_on_mesh(abstract_params(model), mesh))
    params = jax.device_put(random_params(model, spread, seed=7), places)
    losses, gradients = [], None
    with jax.set_mesh(mesh):
        learned, frozen = split_params(params, None if model.lora is None else lora.is_adapter)
        state, step = create_state(config, mesh, learned), make_train_step(config)
        for seed in range(2):
            tokens = np.random.default_rng(seed).integers(0, V, (B, T + 1)).astype(np.int32)
            segments = jnp.ones((B, T), jnp.int32)
            batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments}
            batch |= {"positions": segment_positions(segments)}
            state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)), frozen)
            losses.append(float(metrics["loss"]))
            if seed == 0:
                gradients = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    return losses, gradients


alone = functools.cache(functools.partial(run_on, None))
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [
        pytest.param(mesh, kind, marks=() if kind == "full" and mesh.startswith("fsdp 2") else SLOW)
        for mesh in MESHES
        for kind in KINDS
    ],
)
def test_meshes_train_like_one_device(mesh, kind):
    losses, gradients = run_on(MESHES[mesh], kind)
    expected_losses, expected_gradients = alone(kind)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert_close(gradients, expected_gradients, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_counts_the_rounded_copies(kind):
    def activations(rounds):
        model = dataclasses.replace(KINDS[kind], expert_fake_quant=rounds)
        config = TrainConfig(model=model, data=DataConfig(seq_len=T, batch_size=B))
        mesh = {"data": 1, "fsdp": 2, "context": 1, "expert": 2, "tensor": 1}
        chip = Chip("chip", "", peak=1e12, memory=1e12, link=1e12)
        return estimate(config, chip, mesh).memory.activations

    plain = dataclasses.replace(MODEL, expert_fake_quant=False)
    per_device = tree_bytes(abstract_params(plain)) / 4
    assert activations(True) - activations(False) == pytest.approx(per_device, rel=0.05)


def test_sizes_that_are_no_whole_blocks():
    message = "model.intermediate_size is 40: must be a multiple of 32 if model.expert_fake_quant is True, be"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODEL, intermediate_size=40)


def test_dtypes_that_are_asked_for(trained):
    config, state = trained("full")
    expected = leaves(exported_params(config.model, state.params))
    for dtype in ("bfloat16", "float32"):
        loaded, params, _ = load_pretrained(config.run_dir, dtype=dtype)
        assert (loaded.expert_format, loaded.compute_dtype) == ("mxfp4", dtype)
        found = leaves(params)
        for name in ("head.weight", "blocks.0.moe.router"):
            assert found[name].dtype == dtype
            np.testing.assert_array_equal(np.asarray(found[name], np.float32), expected[name])
        rows = codec.dequantize(
            found["blocks.0.moe.down_blocks"], found["blocks.0.moe.down_scales"], jnp.float32
        )
        np.testing.assert_array_equal(rows.swapaxes(-1, -2), expected["blocks.0.moe.down"])


def test_adapter_is_used_as_its_run_trained_it(trained, tmp_path):
    config, _ = trained("adapters")
    expected = logits(from_pretrained(config.run_dir), TOKENS)
    found = logits(from_pretrained(config.init_from, adapter=config.run_dir), TOKENS)
    np.testing.assert_array_equal(found, expected)
    with pytest.warns(
        UserWarning, match="other programs add the adapter to the base without rounding the sum"
    ):
        export_adapter(config.run_dir, tmp_path / "adapter")


@pytest.mark.parametrize(("adapter", "is_packed"), [(None, True), ("run", False)])
def test_merge_command_says_what_it_writes(trained, tmp_path, capsys, adapter, is_packed):
    config, _ = trained("adapters on packed experts" if is_packed else "adapters")
    source = config.run_dir if adapter is None else config.init_from
    flags = [] if adapter is None else ["--adapter", config.run_dir]
    assert main.main(["merge", source, str(tmp_path / "out"), *flags]) == 0
    said = capsys.readouterr().out
    assert "The run computed with the weights as they are written" in said and "export-adapter" not in said


def test_packed_base_needs_packed_experts(base_folder, tmp_path):
    config = TrainConfig(
        model=KINDS["adapters"], data=DataConfig(seq_len=T), init_from=str(base_folder("mxfp4"))
    )
    message = "^model.expert_format is 'plain': must be 'mxfp4' with model.expert_fake_quant, because the exp"
    with pytest.raises(ValueError, match=message):
        check_base(config, print)


def test_start_from_a_rounded_run_is_reported(trained, tmp_path):
    config, _ = trained("full")
    said = []
    model = dataclasses.replace(MODEL, expert_fake_quant=False)
    check_init_from(
        dataclasses.replace(config, model=model, init_from=config.run_dir, run_dir=str(tmp_path / "new")),
        said.append,
    )
    assert said == [
        f"The weights of {config.run_dir} were trained with a different setting: model.expert_fake_quant is "
        "False, theirs True"
    ]


def test_writing_another_format_warns(trained, tmp_path):
    config, _ = trained("full")
    with pytest.warns(
        UserWarning, match="trained with model.expert_fake_quant, for experts in MXFP4; in bfl"
    ):
        convert(config.run_dir, tmp_path / "out", "bfloat16")
