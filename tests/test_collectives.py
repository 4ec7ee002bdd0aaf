"""What a training step sends on a mesh of eight devices, and the collectives that send less."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tpu_compiler import needs_libtpu
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import SLIDING, DataConfig, MeshConfig, ModelConfig, TrainConfig
from gptoss_jax.config.preset import read_preset
from gptoss_jax.data.batches import abstract_batch
from gptoss_jax.parallel.linear import reduce_scatter
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import ROWS, batch_sharding
from gptoss_jax.parallel.vocabulary import _lookup, embedding_lookup, split_head
from gptoss_jax.planning.compile_tpu import compile_step
from gptoss_jax.planning.hlo import collectives
from gptoss_jax.training.state import abstract_state
from gptoss_jax.training.step import make_train_step


@pytest.mark.parametrize("shape", [(24, 8, 40), (16, 32, 16)], ids=["part of a tile", "tiles"])
@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        (MeshConfig(data=1, fsdp=8), ("fsdp",)),  # all devices: in two steps
        (MeshConfig(data=1, fsdp=2, expert=4), ("fsdp", "expert")),
        (MeshConfig(data=4, fsdp=2), ("fsdp",)),
        (MeshConfig(data=1, fsdp=2, context=2, expert=2), ("fsdp", "context")),
    ],
    ids=str,
)
def test_reduce_scatter(mesh, axes, dimension, shape):
    x = np.random.default_rng(3).standard_normal((8, *shape)).astype(np.float32)

    def scatter(x):
        plain = jax.lax.psum_scatter(x[0], axes, scatter_dimension=dimension, tiled=True)
        return reduce_scatter(x[0], axes, dimension)[None], plain[None]

    with jax.set_mesh(make_mesh(mesh)):
        mapped = jax.shard_map(scatter, in_specs=ROWS, out_specs=ROWS, check_vma=False)
        found, expected = jax.jit(mapped)(x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
        MeshConfig(data=2, fsdp=4),
        MeshConfig(data=2, expert=4),
        MeshConfig(data=1, fsdp=2, context=2, expert=2),
        MeshConfig(data=1, context=4, tensor=2),
    ],
    ids=str,
)
# With 16 tokens, they are exchanged; with 1,024, the table is gathered over the expert axis.
@pytest.mark.parametrize("T", [2, 128])
def test_embedding_lookup(mesh, T):
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((40, 12)).astype(np.float32)
    tokens = rng.integers(0, 40, (8, T)).astype(np.int32)
    factor = rng.standard_normal((8, T, 12)).astype(np.float32)

    def total(weight, tokens):
        x = embedding_lookup(weight, tokens, jnp.bfloat16)
        return jnp.sum(x.astype(jnp.float32) * factor), x

    def run():
        return jax.jit(jax.value_and_grad(total, has_aux=True))(weight, tokens)

    (_, expected), expected_gradient = run()
    assert expected.dtype == jnp.bfloat16
    with jax.set_mesh(make_mesh(mesh)):
        how, rows = _lookup(weight.shape, tokens.size, jnp.dtype("bfloat16")), ("expert",) * (mesh.expert > 1)
        assert (how.exchanged, how.gathered) == ((rows, ()) if T == 2 else ((), rows))
        text = jax.jit(jax.grad(total, has_aux=True)).lower(weight, tokens).as_text()
        (_, found), gradient = run()
    np.testing.assert_array_equal(found.astype(jnp.float32), expected.astype(jnp.float32))
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
    assert ("all_to_all" in text) == (mesh.fsdp * mesh.context > 1)


@pytest.mark.parametrize(
    ("sizes", "size", "num_tokens", "exchanged"),
    [
        # The hidden states of all devices, and none of the table; those of four, and a quarter; all of it.
        ({"fsdp": 2, "expert": 4}, 201088, 4096, ("expert", "fsdp")),
        ({"fsdp": 2, "expert": 4}, 201088, 16384, ("expert",)),
        ({"fsdp": 8}, 201088, 4096, ("fsdp",)),
        ({"fsdp": 8}, 4096, 4096, ()),
        ({"fsdp": 2, "context": 2, "expert": 2}, 201088, 4096, ("expert", "fsdp", "context")),
        ({"context": 8}, 4096, 4096, ()),
        # The vocabulary is not divisible.
        ({"fsdp": 8}, 201084, 4096, ()),
    ],
)
def test_the_head_is_split_where_that_sends_least(sizes, size, num_tokens, exchanged):
    stored = P(("tensor", "expert"), ("fsdp", "context"))
    with jax.set_mesh(make_mesh(MeshConfig(data=1, **sizes))):
        assert split_head((stored,), size, num_tokens) == (("tensor", *exchanged), exchanged)
        # An adapter has no columns that are split.
        split = split_head((stored, P(("tensor", "expert"), None)), size, num_tokens)
        assert split.exchanged == tuple(axis for axis in exchanged if axis == "expert")


D, F, E, V, H = 64, 48, 16, 4096, 24
CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=2, layer_types=(SLIDING,) * 2,
        num_attention_heads=8, num_key_value_heads=4, head_dim=H, num_local_experts=E, num_experts_per_tok=3,
        sliding_window=5, compute_dtype="float32", remat="block",
    ),
    data=DataConfig(seq_len=32, batch_size=8),
)  # fmt: skip


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fsdp", "expert", "memory", "sent"), [(2, 8, 28e9, 13e9), (16, 1, 26.5e9, 115e9)], ids=["2, 8", "16"]
)
def test_memory_and_bytes_sent_of_a_step_of_gpt_oss_20b(fsdp, expert, memory, sent):
    preset = pathlib.Path(__file__).parent.parent / "configs" / "gpt_oss_20b.py"
    config = read_preset(preset, ["--data.batch-size", "16"])
    compiled = compile_step(config, "v5p:2x2x4", {"data": 1, "fsdp": fsdp, "expert": expert, "tensor": 1})
    assert compiled.fits and compiled.peak <= memory
    if compiled.collectives is None:
        pytest.skip("this jaxlib cannot read libtpu's program")
    rest = [entry for entry in compiled.collectives if entry["kind"] != "ragged-all-to-all"]
    assert sum(entry["sent"] for entry in rest) <= sent


@functools.cache
def sent_on(**sizes):
    """Returns the collectives of a step on a mesh, with their axes."""
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=1, **sizes))
    mesh = make_mesh(config.mesh)
    batch = abstract_batch(config.data.batch_size, config.data.seq_len, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        text = make_train_step(config).lower(abstract_state(config, mesh), batch).compile().as_text()
    return [(one, one.axes(mesh.shape)) for one in collectives(text)]


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 4}, {"fsdp": 8}], ids=str)
def test_gradients_of_matrices_are_not_all_reduced(sizes):
    found = sent_on(**sizes)
    # Norms, biases and sinks, the router's statistics, scalars, and several of them together.
    summed = [one.bytes for one, _ in found if one.kind == "all-reduce" and one.sent]
    assert summed and max(summed) < 4 * D * 2 * F
    scattered = sum(one.times * one.bytes for one, _ in found if one.kind == "reduce-scatter")
    experts = E // sizes.get("expert", 1) * 3 * D * F
    assert scattered >= 4 * 2 * experts


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 4}, {"fsdp": 8}], ids=str)
def test_bytes_sent_besides_the_rows_of_experts(sizes):
    n, fsdp, expert = 8, sizes["fsdp"], sizes.get("expert", 1)
    sent = sum(
        one.times * one.sent
        for one, axes in sent_on(**sizes)
        if not (one.kind == "all-to-all" and axes == ("expert",))
    )
    attention, experts = 2 * D * H * (8 + 4), E // expert * 3 * D * F
    # Gathered in both passes, and the gradients scattered: each once.
    blocks = 2 * 4 * 3 * ((attention + D * E) * (n - 1) / n + experts * (fsdp - 1) / fsdp)
    tables = 4 * 4 * V * D * (n - 1) / n
    assert blocks < sent < 1.1 * blocks + 0.6 * tables
