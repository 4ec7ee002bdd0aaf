"""What a training step on TPUs holds in memory for all layers at once, in the compiler's program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from helpers.tpu_compiler import needs_libtpu, tpu_devices

from gptoss_jax.config import SLIDING, DataConfig, MeshConfig, ModelConfig, TrainConfig
from gptoss_jax.data.batches import abstract_batch
from gptoss_jax.kernels import backend
from gptoss_jax.kernels.layer_view import LayerView, cast
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training.state import abstract_state
from gptoss_jax.training.step import make_train_step


def test_casts_of_layers_round_like_plain_casts(monkeypatch):
    # Ties to even in both directions, an overflow, subnormal numbers, and what must stay as it is.
    bits = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00018000, 0x80000000, 0x7F800000], np.uint32)
    weights = np.concatenate([bits.view(np.float32), np.random.default_rng(7).standard_normal(50)])
    weights = weights.astype(np.float32)
    monkeypatch.setattr(backend, "platform", lambda: "tpu")

    def layer(weights):
        return cast(LayerView(weights[None], 0), jnp.dtype("bfloat16"))

    assert "reduce_precision" in str(jax.make_jaxpr(layer)(weights))
    assert "reduce_precision" not in str(jax.make_jaxpr(lambda x: cast(x, jnp.dtype("float16")))(weights))
    found, vjp = jax.vjp(layer, weights)
    np.testing.assert_array_equal(found, jnp.asarray(weights).astype(jnp.bfloat16))
    g = np.random.default_rng(8).standard_normal(56).astype(jnp.bfloat16)
    np.testing.assert_array_equal(vjp(jnp.asarray(g))[0], g.astype(np.float32))


L, E, D, F = 3, 6, 144, 384
CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=96, hidden_size=D, intermediate_size=F, num_hidden_layers=L, layer_types=(SLIDING,) * L,
        num_attention_heads=8, num_key_value_heads=4, head_dim=16, num_local_experts=E, num_experts_per_tok=2,
        sliding_window=8, remat="block",
    ),
    data=DataConfig(seq_len=64, batch_size=4),
    mesh=MeshConfig(data=1, fsdp=4),
)  # fmt: skip


@needs_libtpu
def test_stacks_of_layers_are_neither_cast_nor_padded():
    with tpu_devices("v5p:2x2x1") as devices:
        mesh = make_mesh(CONFIG.mesh, devices)
        batch = abstract_batch(CONFIG.data.batch_size, CONFIG.data.seq_len, batch_sharding(mesh))
        with jax.set_mesh(mesh):
            text = make_train_step(CONFIG).lower(abstract_state(CONFIG, mesh), batch).compile().as_text()
    experts = rf"\[{L},{E},(?:{D // 4},2,{F}|{F},{D // 4})\]"
    assert re.search("f32" + experts, text)
    assert not re.search("bf16" + experts, text)
    # The part of a dimension that a device has is never last in memory, where it would be padded to 128.
    assert not re.search(rf"f32\[{L},{E},{F},{D // 4}\]{{3,", text)
