"""With `jax_enable_x64` everything computes in the same types, and gives the same results, as without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import random_checkpoint

from gptoss_jax import kernels
from gptoss_jax.checkpoints.load import load_pretrained
from gptoss_jax.config import SLIDING, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from gptoss_jax.data.batches import abstract_batch
from gptoss_jax.evaluation.logprobs import token_logprobs
from gptoss_jax.inference import slots
from gptoss_jax.inference.generate import generate
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.transformer import abstract_params, bind, init_params, segment_positions
from gptoss_jax.parallel import all_to_all
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training.state import abstract_state, create_state
from gptoss_jax.training.step import make_eval_step, make_train_step

B, T = 8, 13
CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=98, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, num_local_experts=8, num_experts_per_tok=3, sliding_window=4,
        layer_types=(SLIDING,) * 2, sink_tokens=2, initializer_range=0.3, compute_dtype="float32",
    ),
    data=DataConfig(seq_len=T, batch_size=B),
    optim=OptimConfig(warmup_steps=0),
    steps=20,
)  # fmt: skip
SMALL = dataclasses.replace(CONFIG.model, num_hidden_layers=1, layer_types=None)
PACKED = dataclasses.replace(SMALL, expert_format="mxfp4")
ONE, SPREAD = MeshConfig(data=1), MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
PROMPTS = [[5], [11, 3, 96, 0, 7, 8, 9], list(range(40, 63))]
SAMPLING = [
    SamplingParams(12, 0.0, top_p=0.9, seed=7, logprobs=True),
    SamplingParams(12, 0.9, top_k=20, top_p=0.9, min_p=0.01, seed=4294967295, logprobs=True),
    SamplingParams(12, 1.1, top_p=0.9, min_p=0.02, logprobs=True),
]


def changed(model: dict, optim: dict) -> TrainConfig:
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, **model),
        optim=dataclasses.replace(CONFIG.optim, **optim),
    )


def mesh_of(config: MeshConfig) -> jax.sharding.Mesh:
    return make_mesh(config, jax.devices()[:1] if config == ONE else None)


def in_both_modes(function):
    """Returns the results of a function without and with jax_enable_x64."""
    with jax.enable_x64(False):
        narrow = function()
    with jax.enable_x64(True):
        return narrow, function()


def wide_arrays(jaxpr) -> list[str]:
    """Returns the operations in a program, nested programs included, whose result is a 64-bit array.
    Scalars do not count, nor does the argmax in `jax.random.categorical`, whose type cannot be set."""
    found = []
    for equation in jaxpr.eqns:
        wide = [
            str(variable.aval)
            for variable in equation.outvars
            if variable.aval.ndim and str(variable.aval.dtype) in ("int64", "uint64", "float64")
        ]
        if wide and equation.primitive.name != "argmax":
            found.append(f"{equation.primitive.name}: {wide}")
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            found += wide_arrays(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize(
    ("mesh", "ragged", "native", "model", "optim"),
    [
        (ONE, False, True, {"attention_dropout": 0.1, "residual_dropout": 0.1, "layer_types": None}, {}),
        (SPREAD, False, False, {"expert_capacity_factor": 1.2, "remat": "dots"}, {"grad_accum_steps": 2}),
        (SPREAD, True, True, {"scan_layers": False, "compute_dtype": "bfloat16"}, {"name": "muon"}),
    ],
    ids=["dropout", "capacity", "muon"],
)
def test_training_has_no_64_bit_arrays(mesh, ragged, native, model, optim, monkeypatch):
    monkeypatch.setattr(kernels.cpu.build, "is_available", lambda: native)
    monkeypatch.setattr(all_to_all, "has_ragged", lambda: ragged)
    config, mesh = changed(model, optim), mesh_of(mesh)
    with jax.enable_x64(True), jax.set_mesh(mesh):
        state = abstract_state(config, mesh)
        types = {str(leaf.dtype) for leaf in jax.tree.leaves(state)}
        assert types <= {"float32", "int32", "uint32"}
        batch = abstract_batch(B * 2, T)
        assert wide_arrays(jax.make_jaxpr(make_train_step(config))(state, batch).jaxpr) == []
        assert wide_arrays(jax.make_jaxpr(make_eval_step(config.model))(state.params, batch).jaxpr) == []


@pytest.mark.parametrize(
    ("config", "mesh", "native", "rows"),
    [
        (CONFIG.model, ONE, True, 4),
        (CONFIG.model, ONE, False, 32),
        (CONFIG.model, SPREAD, True, 32),
        (PACKED, ONE, True, 32),
        (PACKED, SPREAD, False, 4),
    ],
)
def test_inference_has_no_64_bit_arrays(config, mesh, native, rows, monkeypatch):
    monkeypatch.setattr(kernels.cpu.build, "is_available", lambda: native)

    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    scored = abstract_batch(rows, 16)
    with jax.enable_x64(True), jax.set_mesh(mesh_of(mesh)):
        params = abstract_params(config)
        state = jax.eval_shape(lambda: slots.init_slots(config, rows, 256))
        row = jax.eval_shape(lambda: slots.init_row(config, 256))
        types = {str(leaf.dtype) for leaf in jax.tree.leaves((state, row))}
        assert types == {"float32", "int32", "uint32", "bool"}
        prefill = functools.partial(slots.prefill, batch=rows, has_logprobs=True)
        prompts = [row] * 4, shape(4, 32), shape(4, 32), shape(4)
        request = slots.SlotRequest.of(config, SAMPLING[0], pause_token=3)
        flags = shape(rows, dtype=bool)
        allowed = shape(*state.requests.stop_mask.shape)
        programs = [
            (prefill, (config, params, *prompts), 0),
            (token_logprobs, (config, params, scored), 0),
            (slots.insert, (state, row, np.int32(2), np.int32(5), request), ()),
            (slots.decode, (config, params, state, np.int32(4), allowed, (flags, flags)), 0),
        ]
        for function, arguments, static in programs:
            traced = jax.make_jaxpr(function, static_argnums=static)(*arguments)
            assert wide_arrays(traced.jaxpr) == []


@pytest.mark.slow
@pytest.mark.parametrize(("config", "native"), [(SMALL, False), (PACKED, True)])
def test_generated_tokens_are_the_same(config, native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels.cpu.build, "is_available", lambda: False)

    def answers():
        found = generate(bind(config, init_params(config, jax.random.key(3))), PROMPTS, SAMPLING)
        return [answer.tokens for answer in found], [answer.logprobs for answer in found]

    narrow, wide = in_both_modes(answers)
    assert narrow[0] == wide[0]
    for one, other in zip(narrow[1], wide[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.slow
def test_losses_are_the_same():
    config = dataclasses.replace(
        changed({"residual_dropout": 0.1, "num_hidden_layers": 1, "layer_types": None}, {}),
        seed=5_000_000_000,
    )
    mesh = make_mesh(MeshConfig(data=1, expert=2, tensor=2), jax.devices()[:4])

    def losses():
        rows = np.random.default_rng(0).integers(0, 98, (B, T + 1), np.int32)
        segments = np.ones((B, T), np.int32)
        batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "segment_ids": segments}
        batch["positions"] = np.asarray(segment_positions(jnp.asarray(segments)))
        batch = jax.device_put(batch, batch_sharding(mesh))
        with jax.set_mesh(mesh):
            state, step = create_state(config, mesh), make_train_step(config)
            found = []
            for _ in range(2):
                state, metrics = step(state, batch)
                found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
            sums, weight = make_eval_step(config.model)(state.params, batch)
            found.append((float(sums["loss"]), float(weight)))
        return found

    narrow, wide = in_both_modes(losses)
    np.testing.assert_allclose(narrow, wide, rtol=1e-6)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=1, fsdp=8)])
def test_loaded_weights_are_the_same(mesh, tmp_path):
    folder = random_checkpoint(tmp_path / "model", experts_per_token=2, form="mxfp4")
    mesh = mesh and make_mesh(mesh)
    narrow, wide = in_both_modes(lambda: load_pretrained(folder, mesh=mesh)[1])
    for one, other in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def accelerator_kernels():
    """Returns the Pallas kernels with small inputs: (function of float arrays, their shapes)."""
    from gptoss_jax.kernels.attention.pallas_tpu import splash_attention
    from gptoss_jax.kernels.attention.pallas_triton import triton_attention
    from gptoss_jax.kernels.attention.reference import AttentionSpec
    from gptoss_jax.kernels.grouped_matmul.pallas_tpu import megablox_grouped_matmul
    from gptoss_jax.kernels.grouped_matmul.pallas_triton import triton_grouped_matmul
    from gptoss_jax.kernels.mxfp4.api import differentiable_matmul
    from gptoss_jax.kernels.mxfp4.pallas_tpu import mosaic_mxfp4_matmul
    from gptoss_jax.kernels.mxfp4.pallas_triton import triton_mxfp4_matmul

    rows = np.tile(np.arange(64, dtype=np.int32), (2, 1))
    sizes, segments = np.array([5, 0, 9], np.int32), np.ones_like(rows)
    blocks, scales = np.zeros((3, 40, 2, 16), np.uint8), np.full((3, 40, 2), 127, np.uint8)
    heads = (2, 64, 6, 16), (2, 64, 2, 16), (2, 64, 2, 16)
    for attention in (triton_attention, splash_attention):
        yield lambda q, k, v, call=attention: call(q, k, v, segments, rows, AttentionSpec(7)), heads
    for matmul in (triton_grouped_matmul, megablox_grouped_matmul):
        yield lambda x, w, call=matmul: call(x, w, sizes), ((16, 64), (3, 64, 40))
    for matmul in (triton_mxfp4_matmul, mosaic_mxfp4_matmul):
        yield lambda x, call=matmul: differentiable_matmul(call, x, blocks, scales, sizes), ((16, 64),)


def test_accelerator_kernels_have_no_64_bit_arrays():
    for function, shapes in accelerator_kernels():
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        with jax.enable_x64(True):
            gradient = jax.grad(lambda *xs, f=function: f(*xs).sum(), tuple(range(len(shapes))))
            assert wide_arrays(jax.make_jaxpr(gradient)(*arguments).jaxpr) == []
