"""Shapes by letters: `assert_shapes`, and the boundaries of modules and kernels, right and wrong."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gptoss_jax.config import SLIDING
from gptoss_jax.kernels.attention.api import attention
from gptoss_jax.kernels.attention.reference import AttentionSpec
from gptoss_jax.kernels.grouped_matmul.api import grouped_matmul
from gptoss_jax.kernels.mxfp4.api import mxfp4_grouped_matmul
from gptoss_jax.kernels.shapes import assert_shapes
from gptoss_jax.model.attention import Attention, Segments
from gptoss_jax.model.moe import MoE
from gptoss_jax.model.rope import rope_cos_sin
from gptoss_jax.model.transformer import Block, Embedding, RMSNorm, Transformer, segment_positions
from gptoss_jax.parallel.expert_parallel import Routing, apply_experts
from gptoss_jax.parallel.linear import sharded_einsum
from gptoss_jax.parallel.vocabulary import embedding_lookup

# Rows and tokens of activations; they differ from the sizes of the config and from each other.
B, T = 2, 11


def test_assert_shapes_returns_the_size_of_each_letter():
    q_BTNH, k_BSKH = jnp.zeros((2, 3, 4, 5)), jax.ShapeDtypeStruct((2, 7, 1, 5), jnp.bfloat16)
    dims = assert_shapes("BTNH BSKH N BS1H", q_BTNH, k_BSKH, None, k_BSKH)
    assert (dims.B, dims.T, dims.N, dims.H, dims.S, dims.K) == (2, 3, 4, 5, 7, 1)


@pytest.mark.parametrize(
    ("letters", "message"),
    [
        ("BTD BSD", r"the shape \(2, 4, 6\) is not BSD with B=2, T=3, D=5"),
        ("BTD BTS", r"the shape \(2, 4, 6\) is not BTS with B=2, T=3, D=5"),
        ("BTD BS", r"the shape \(2, 4, 6\) is not BS with B=2, T=3, D=5"),
        ("BTD BSDH", r"the shape \(2, 4, 6\) is not BSDH with"),
        ("BTT BSD", r"the shape \(2, 3, 5\) is not BTT"),
        ("B3D 14H", r"the shape \(2, 4, 6\) is not 14H"),
    ],
)
def test_errors_name_letters_and_sizes(letters, message):
    with pytest.raises(AssertionError, match=message):
        assert_shapes(letters, jnp.zeros((2, 3, 5)), jnp.zeros((2, 4, 6)))


def test_shapes_are_checked_while_tracing():
    @jax.jit
    def matmul(x_MD, w_DF):
        assert_shapes("MD DF", x_MD, w_DF)
        return x_MD @ w_DF

    assert matmul(jnp.ones((2, 3)), jnp.ones((3, 4))).shape == (2, 4)
    with pytest.raises(AssertionError, match=r"the shape \(4, 3\) is not DF with M=2, D=3"):
        matmul(jnp.ones((2, 3)), jnp.ones((4, 3)))


def sizes_of(config):
    """Returns the size of each letter; J is a half of the head size."""
    return chex.Dimensions(
        B=B, T=T, D=config.hidden_size, E=config.num_local_experts, V=config.vocab_size,
        L=config.num_hidden_layers, J=config.head_dim // 2,
    )  # fmt: skip


def one_document(rows=B, tokens=T):
    return jnp.ones((rows, tokens), jnp.int32), jnp.broadcast_to(jnp.arange(tokens), (rows, tokens))


def segments_for(config, rows=B, tokens=T):
    segment_ids_BT, positions_BT = one_document(rows, tokens)
    return Segments(segment_ids_BT, positions_BT, rope_cos_sin(config, positions_BT))


def shape_of_call(make_module, *inputs):
    """Returns the abstract result of a module that is made while it is traced."""
    return jax.eval_shape(lambda: make_module()(*inputs))


def activations(config, *shape):
    return jnp.zeros(shape or (B, T, config.hidden_size), jnp.bfloat16)


def test_rms_norm_keeps_shape_and_dtype(either_config):
    y_BTD = shape_of_call(lambda: RMSNorm(either_config), activations(either_config))
    chex.assert_shape(y_BTD, sizes_of(either_config)["BTD"])
    chex.assert_type(y_BTD, jnp.bfloat16)


def test_attention_module_keeps_shape_and_dtype(either_config):
    config = either_config
    x_BTD, segments = activations(config), segments_for(config)
    y_BTD, cache = shape_of_call(lambda: Attention(config, SLIDING, rngs=nnx.Rngs(0)), x_BTD, segments)
    chex.assert_shape(y_BTD, sizes_of(config)["BTD"])
    chex.assert_type(y_BTD, jnp.bfloat16)
    assert cache is None


def test_moe_keeps_shape_and_dtype(either_config):
    config, dims = either_config, sizes_of(either_config)
    mask_BT = jnp.ones((B, T), bool)
    y_BTD, stats = shape_of_call(lambda: MoE(config, rngs=nnx.Rngs(0)), activations(config), mask_BT)
    chex.assert_shape(y_BTD, dims["BTD"])
    chex.assert_type(y_BTD, jnp.bfloat16)
    chex.assert_shape([stats["load"], stats["probability"]], dims["E"])
    chex.assert_shape([stats["z"], stats["dropped"]], ())
    chex.assert_type(jax.tree.leaves(stats), jnp.float32)


def test_block_keeps_shape_and_dtype(either_config):
    config, dims = either_config, sizes_of(either_config)
    x_BTD, segments = activations(config), segments_for(config)
    y_BTD, cache, stats = shape_of_call(lambda: Block(config, SLIDING, rngs=nnx.Rngs(0)), x_BTD, segments)
    chex.assert_shape(y_BTD, dims["BTD"])
    chex.assert_type(y_BTD, jnp.bfloat16)
    chex.assert_shape([stats["load"], stats["probability"]], dims["E"])
    assert cache is None


def test_embedding_has_one_vector_per_token(either_config):
    embedding = nnx.eval_shape(lambda: Embedding(either_config, "embedding", rngs=nnx.Rngs(0)))
    chex.assert_shape(embedding.weight.get_value(), sizes_of(either_config)["VD"])


def test_transformer_gives_float32_logits_and_the_statistics_of_every_layer(either_config):
    config, dims = either_config, sizes_of(either_config)
    tokens_BT = jnp.zeros((B, T), jnp.int32)

    def everything():
        model = Transformer(config, rngs=nnx.Rngs(0))
        hidden = model.hidden_states(tokens_BT)
        return model(tokens_BT), hidden, model.head_operands(hidden[0])

    logits_BTV, (hidden_BTD, cache, stats), (_, (head_VD,)) = jax.eval_shape(everything)
    chex.assert_shape(logits_BTV, dims["BTV"])
    chex.assert_shape(hidden_BTD, dims["BTD"])
    chex.assert_shape(head_VD, dims["VD"])
    chex.assert_type([logits_BTV, hidden_BTD, head_VD], jnp.float32)
    chex.assert_shape([stats["load"], stats["probability"]], dims["LE"])
    chex.assert_shape([stats["z"], stats["dropped"]], dims["L"])
    assert cache is None


def test_positions_and_rope_tables(either_config):
    segment_ids_BT, positions_BT = one_document()
    chex.assert_shape(jax.eval_shape(segment_positions, segment_ids_BT), (B, T))
    chex.assert_shape(rope_cos_sin(either_config, positions_BT), sizes_of(either_config)["BTJ"])


@pytest.mark.parametrize(
    ("equation", "x", "w", "y"),
    [
        ("BTD,DNH->BTNH", (2, 3, 4), (4, 5, 6), (2, 3, 5, 6)),
        ("BTNH,NHD->BTD", (2, 3, 5, 6), (5, 6, 4), (2, 3, 4)),
        ("BTD,VD->BTV", (2, 3, 4), (7, 4), (2, 3, 7)),
        ("MD,De->Me", (8, 4), (4, 9), (8, 9)),
    ],
)
def test_sharded_einsum_has_the_shape_of_its_equation(equation, x, w, y):
    x, w = jnp.ones(x, jnp.bfloat16), jnp.ones(w)
    one = jax.eval_shape(functools.partial(sharded_einsum, equation), x, w)
    several = jax.eval_shape(functools.partial(sharded_einsum, equation), x, [w, w])
    wide = jax.eval_shape(functools.partial(sharded_einsum, equation, result_type=jnp.float32), x, w)
    chex.assert_shape([one, *several, wide], y)
    chex.assert_type([one, *several, wide], [jnp.bfloat16] * 3 + [jnp.float32])
    assert len(several) == 2


def test_embedding_lookup_adds_the_hidden_dimension():
    x_BTD = jax.eval_shape(embedding_lookup, jnp.zeros((7, 5)), jnp.zeros((2, 3), jnp.int32))
    chex.assert_shape(x_BTD, (2, 3, 5))


@pytest.mark.parametrize("has_sinks", [True, False])
def test_attention_has_the_shape_of_its_queries(has_sinks):
    q_BTNH, k_BTKH, v_BTKH = (jnp.zeros((B, T, heads, 8), jnp.bfloat16) for heads in (6, 2, 2))
    sinks_N = jnp.zeros(6) if has_sinks else None
    out_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, *one_document(), AttentionSpec(4), sinks_N=sinks_N)
    chex.assert_equal_shape([out_BTNH, q_BTNH])
    chex.assert_type(out_BTNH, jnp.bfloat16)


def grouped_inputs():
    """x_RD, w_EDF, group_sizes_E, bias_EF."""
    return jnp.ones((9, 4)), jnp.ones((3, 4, 5)), jnp.array([2, 0, 5], jnp.int32), jnp.ones((3, 5))


def test_grouped_matmul_has_one_row_of_outputs_per_row():
    x_RD, w_EDF, group_sizes_E, bias_EF = grouped_inputs()
    chex.assert_shape(grouped_matmul(x_RD, w_EDF, group_sizes_E), (9, 5))
    chex.assert_shape(grouped_matmul(x_RD, w_EDF, group_sizes_E, bias_EF), (9, 5))
    # Dimensions after the first of the outputs are outputs too: gate and up.
    w_EDPF, bias_EPF = jnp.ones((3, 4, 2, 5)), jnp.ones((3, 2, 5))
    chex.assert_shape(grouped_matmul(x_RD, w_EDPF, group_sizes_E, bias_EPF), (9, 10))


def mxfp4_inputs():
    """x_RD, blocks_EFGC, scales_EFG, group_sizes_E, bias_EF, for D = 64."""
    blocks_EFGC, scales_EFG = jnp.zeros((3, 5, 2, 16), jnp.uint8), jnp.full((3, 5, 2), 127, jnp.uint8)
    return jnp.ones((9, 64)), blocks_EFGC, scales_EFG, jnp.array([2, 0, 5], jnp.int32), jnp.ones((3, 5))


def test_mxfp4_grouped_matmul_has_one_row_of_outputs_per_row():
    *inputs, bias_EF = mxfp4_inputs()
    chex.assert_shape([mxfp4_grouped_matmul(*inputs), mxfp4_grouped_matmul(*inputs, bias_EF)], (9, 5))


def expert_inputs(num_tokens=7):
    """x_MD, routing, parameters and their letters."""
    routing = Routing(jnp.zeros((num_tokens, 2), jnp.int32), jnp.ones((num_tokens, 2)))
    return jnp.ones((7, 4)), routing, {"down": jnp.ones((3, 4, 4))}, {"down": "EFD"}


def apply_identity(x_MD, routing, parameters, letters):
    return apply_experts(lambda x_RD, parameters, sizes_E: x_RD, x_MD, routing, parameters, letters)


def test_apply_experts_keeps_the_shape_of_its_tokens():
    y_MD, num_dropped = apply_identity(*expert_inputs())
    chex.assert_shape(y_MD, (7, 4))
    chex.assert_shape(num_dropped, ())


def test_rms_norm_names_the_letters_of_a_wrong_shape(tiny_config):
    x_BTD = activations(tiny_config, B, T, 25)
    with pytest.raises(AssertionError, match=r"\(24,\) is not D with B=2, T=11, D=25"):
        shape_of_call(lambda: RMSNorm(tiny_config), x_BTD)


def test_attention_module_names_the_letters_of_a_wrong_shape(tiny_config):
    segments = segments_for(tiny_config, tokens=12)
    with pytest.raises(AssertionError, match=r"\(2, 12\) is not BT with B=2, T=11, D=24"):
        shape_of_call(
            lambda: Attention(tiny_config, SLIDING, rngs=nnx.Rngs(0)), activations(tiny_config), segments
        )


def test_moe_names_the_letters_of_a_wrong_shape(tiny_config):
    with pytest.raises(AssertionError, match=r"\(2, 10\) is not BT with B=2, T=11, D=24"):
        shape_of_call(
            lambda: MoE(tiny_config, rngs=nnx.Rngs(0)), activations(tiny_config), jnp.ones((B, 10), bool)
        )


def test_block_names_the_letters_of_a_wrong_shape(tiny_config):
    segments = segments_for(tiny_config, rows=3)
    with pytest.raises(AssertionError, match=r"\(3, 11\) is not BT with B=2, T=11, D=24"):
        shape_of_call(
            lambda: Block(tiny_config, SLIDING, rngs=nnx.Rngs(0)), activations(tiny_config), segments
        )


@pytest.mark.parametrize("tokens", [jnp.zeros(T, jnp.int32), jnp.zeros((B, T, 1), jnp.int32)])
def test_embedding_lookup_names_the_letters_of_a_wrong_shape(tokens):
    with pytest.raises(AssertionError, match=r"is not BT with V=7, D=5"):
        embedding_lookup(jnp.zeros((7, 5)), tokens)


@pytest.mark.parametrize("wrong", ["segment ids", "positions"])
def test_transformer_names_the_letters_of_a_wrong_shape(tiny_config, wrong):
    tokens_BT, right, longer = jnp.zeros((B, T), jnp.int32), one_document()[0], one_document(B, 12)[0]
    inputs = (longer, right) if wrong == "segment ids" else (right, longer)
    with pytest.raises(AssertionError, match=r"\(2, 12\) is not BT with B=2, T=11"):
        shape_of_call(lambda: Transformer(tiny_config, rngs=nnx.Rngs(0)), tokens_BT, *inputs)


def test_sharded_einsum_names_the_letters_of_a_wrong_shape():
    x_BTD, q_DNH, k_DKH = jnp.ones((2, 3, 4)), jnp.ones((4, 5, 6)), jnp.ones((5, 4, 6))
    with pytest.raises(AssertionError, match=r"\(5, 4, 6\) is not DNH with B=2, T=3, D=4"):
        sharded_einsum("BTD,DNH->BTNH", x_BTD, [q_DNH, k_DKH])


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (1, (2, 11, 2, 7), "(2, 11, 2, 7) is not BTKH with B=2, T=11, N=6, H=8"),
        (2, (2, 10, 2, 8), "(2, 10, 2, 8) is not BTKH with B=2, T=11, N=6, H=8, K=2"),
        (3, (3, 11), "(3, 11) is not BT with B=2, T=11, N=6, H=8, K=2"),
        (4, (2, 12), "(2, 12) is not BT with B=2, T=11, N=6, H=8, K=2"),
        (5, (5,), "(5,) is not N with B=2, T=11, N=6, H=8, K=2"),
    ],
)
def test_attention_names_the_letters_of_a_wrong_shape(index, shape, message):
    shapes = [(2, 11, 6, 8), (2, 11, 2, 8), (2, 11, 2, 8), (2, 11), (2, 11), (6,)]
    shapes[index] = shape
    *inputs, sinks_N = map(jnp.zeros, shapes)
    with pytest.raises(AssertionError, match=re.escape(message)):
        attention(*inputs, AttentionSpec(), sinks_N=sinks_N)


def test_apply_experts_names_the_letters_of_a_wrong_shape():
    x_MD, _, *parameters = expert_inputs()
    routing = expert_inputs(num_tokens=8)[1]
    with pytest.raises(AssertionError, match=r"\(8, 2\) is not MX with M=7, D=4"):
        apply_identity(x_MD, routing, *parameters)
    weights_MX = jnp.ones((7, 3))
    with pytest.raises(AssertionError, match=r"\(7, 3\) is not MX with M=7, D=4, X=2"):
        apply_identity(x_MD, Routing(expert_inputs()[1].experts_MX, weights_MX), *parameters)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (1, (3, 5, 5), "(3, 5, 5) is not EDF with R=9, D=4"),
        (1, (3, 5, 2, 5), "(3, 5, 2, 5) is not EDPF with R=9, D=4"),
        (2, (4,), "(4,) is not E with R=9, D=4, E=3, F=5"),
        (3, (3, 6), "(3, 6) is not EF with R=9, D=4, E=3, F=5"),
    ],
)
def test_grouped_matmul_names_the_letters_of_a_wrong_shape(index, shape, message):
    inputs = list(grouped_inputs())
    inputs[index] = jnp.ones(shape, inputs[index].dtype)
    with pytest.raises(AssertionError, match=re.escape(message)):
        grouped_matmul(*inputs)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (9, 96), "D is not 32 G with D=96, G=2"),
        (1, (3, 5, 16), "(3, 5, 16) is not EFGC with R=9, D=64"),
        (2, (3, 5, 3), "(3, 5, 3) is not EFG with R=9, D=64, E=3, F=5, G=2, C=16"),
        (3, (4,), "(4,) is not E with R=9, D=64, E=3, F=5, G=2, C=16"),
        (4, (4, 5), "(4, 5) is not EF with R=9, D=64, E=3, F=5, G=2, C=16"),
    ],
)
def test_mxfp4_grouped_matmul_names_the_letters_of_a_wrong_shape(index, shape, message):
    inputs = list(mxfp4_inputs())
    inputs[index] = jnp.ones(shape, inputs[index].dtype)
    with pytest.raises(AssertionError, match=re.escape(message)):
        mxfp4_grouped_matmul(*inputs)
