"""The C++ kernel of attention against the reference: results and gradients."""

import functools
import hashlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import MeshConfig
from gptoss_jax.kernels.attention.api import attention
from gptoss_jax.kernels.attention.reference import AttentionSpec, attention_mask, reference_attention
from gptoss_jax.kernels.cpu import build
from gptoss_jax.parallel.linear import shard_map_heads
from gptoss_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.skipif(not build.is_available(), reason="no C++ compiler here")

# Three chunks of 96 tokens, the last one with 29; neither this nor a head is a multiple of a vector.
B, T, K, H = 2, 221, 2, 11


def heads(N, seed=0, rows=B, length=T, size=H):
    """Random q, k, v, sinks and output gradient; attention weights are far from uniform."""
    rng = np.random.default_rng(seed)
    shapes = *((rows, length, count, size) for count in (N, K, K)), (N,), (rows, length, N, size)
    return [jnp.asarray(2 * rng.standard_normal(shape), jnp.float32) for shape in shapes]


def documents(*rows):
    """Segment ids and positions of rows of documents with these lengths, the last one padding."""
    segments = [np.repeat([*range(1, len(lengths)), 0], lengths) for lengths in rows]
    positions = [np.concatenate([np.arange(n) for n in lengths]) for lengths in rows]
    return jnp.array(segments, jnp.int32), jnp.array(positions, jnp.int32)


# Documents that start within chunks and end at their boundaries, a long one, and padding.
PACKED = documents((40, 56, 100, 20, 5), (3, 190, 28))
ONE = documents((T, 0), (T, 0))


def with_gradients(attend, where, spec, has_sinks, inputs):
    def result(q, k, v, sinks):
        return attend(q, k, v, *where, spec, sinks_N=sinks if has_sinks else None)

    *inputs, d_out = inputs
    out, pull = jax.vjp(result, *inputs)
    return out, *pull(d_out)


def reference(q, k, v, segments, positions, spec, *, sinks_N):
    return reference_attention(q, k, v, attention_mask(segments, positions, spec), sinks_N=sinks_N)


def jitted(attend, where, spec, has_sinks=True):
    return jax.jit(lambda *inputs: with_gradients(attend, where, spec, has_sinks, inputs))


def assert_equal(found, expected, tolerance=1e-5):
    for name, f, e in zip(("out", "dq", "dk", "dv", "d_sinks"), found, expected, strict=True):
        scale = max(np.abs(e).max(), 1)  # with one key and no sink, the scores have no gradient
        np.testing.assert_allclose(f, e, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("window", [None, 1, 5, 110, 500])
@pytest.mark.parametrize(("N", "has_sinks"), [(2, True), (6, True), (6, False)])
def test_results_and_gradients_equal_the_reference(window, N, has_sinks):
    inputs = heads(N)
    for where in (ONE, PACKED):
        fast, plain = (jitted(f, where, AttentionSpec(window), has_sinks) for f in (attention, reference))
        text = fast.lower(*inputs).as_text()
        assert "@gptoss_jax.Attention(" in text and "@gptoss_jax.AttentionGrad(" in text
        assert_equal(fast(*inputs), plain(*inputs))


@pytest.mark.parametrize(("length", "size"), [(1, 1), (7, 8), (96, 64), (97, 40)])
def test_other_sizes_equal_the_reference(length, size):
    inputs = heads(6, length=length, size=size)
    where = documents((length, 0), (length, 0))
    fast, plain = (jitted(f, where, AttentionSpec()) for f in (attention, reference))
    assert_equal(fast(*inputs), plain(*inputs))


def test_very_large_scores_and_sinks_give_no_nan():
    q, k, v, sinks, d_out = heads(6)
    for inputs in ((1e4 * q, k, v, sinks, d_out), (q, k, v, 1e4 * sinks, d_out)):
        assert all(np.isfinite(x).all() for x in jitted(attention, PACKED, AttentionSpec(50))(*inputs))


def test_a_value_that_is_not_a_number_is_not_hidden():
    q, k, v, sinks, d_out = heads(6)
    fast = jitted(attention, ONE, AttentionSpec(50))
    for inputs in ((q.at[1, 100, 2, 3].set(jnp.nan), k, v), (q, k.at[1, 100, 0, 3].set(jnp.nan), v)):
        out, dq, *_ = fast(*inputs, sinks, d_out)
        assert np.isnan(out[1, 100, 2]).all() and np.isnan(dq[1, 100, 2]).all()
        assert np.isfinite(out[0]).all() and np.isfinite(out[1, :100]).all()


def test_a_row_does_not_depend_on_the_others():
    inputs = q, k, v, sinks, d_out = heads(6)
    together = jitted(attention, PACKED, AttentionSpec(110))(*inputs)
    where = tuple(x[1:] for x in PACKED)
    alone = jitted(attention, where, AttentionSpec(110))(q[1:], k[1:], v[1:], sinks, d_out[1:])
    for x, y in zip(together[:4], alone[:4], strict=True):
        np.testing.assert_array_equal(x[1:], y)


DIGEST = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import test_attention_cpu as tests
print(tests.digest())
"""


def digest():
    results = jitted(attention, PACKED, AttentionSpec(110))(*heads(6))
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in results)).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_bits_do_not_depend_on_the_number_of_threads():
    path = os.pathsep.join((os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")))
    for threads in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", DIGEST, threads], env=os.environ | {"PYTHONPATH": path},
            check=True, capture_output=True, encoding="utf-8",
        )  # fmt: skip
        assert done.stdout.split()[-1] == digest(), threads


def test_recomputing_it_in_the_backward_pass_gives_the_same_bits():
    def remat(q, k, v, *where, sinks_N):
        attend = functools.partial(attention, sinks_N=sinks_N)
        return jax.checkpoint(attend, static_argnums=5)(q, k, v, *where)

    saved, recomputed = (jitted(f, PACKED, AttentionSpec(110))(*heads(6)) for f in (attention, remat))
    jax.tree.map(np.testing.assert_array_equal, saved, recomputed)


def test_on_a_mesh_each_device_attends_with_its_rows_and_heads():
    *inputs, d_out = heads(6, rows=4)
    where = documents((40, 56, 100, 20, 5), (3, 190, 28), (T, 0), (1, 220, 0))
    spec = AttentionSpec(110)

    def on_mesh(q, k, v, segments, positions, spec, *, sinks_N):
        def one_device(q, k, v, sinks, key, segments, positions):
            return attention(q, k, v, segments, positions, spec, sinks_N=sinks)

        return shard_map_heads(one_device, (q, k, v), sinks_N, None, segments, positions)

    expected = jitted(reference, where, spec)(*inputs, d_out)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])):
        fast = jitted(on_mesh, where, spec)
        assert "gptoss_jax.AttentionGrad" in fast.lower(*inputs, d_out).as_text()
        assert_equal(fast(*inputs, d_out), expected)


@pytest.mark.parametrize(
    ("dtype", "settings", "options"),
    [
        (jnp.float16, {}, {}),
        (jnp.float32, {"window": 5, "sink_tokens": 2}, {}),
        (jnp.float32, {"dropout": 0.5}, {"dropout_key": jax.random.key(0)}),
        (jnp.float32, {}, {"offset": 0}),  # prefill: bits do not depend on where a prompt is cut
    ],
)
def test_what_the_kernel_does_not_support_is_xla(dtype, settings, options):
    q, k, v, *_ = (x.astype(dtype) for x in heads(6))
    attend = jax.jit(lambda *qkv: attention(*qkv, *ONE, AttentionSpec(**settings), **options))
    assert "gptoss_jax." not in attend.lower(q, k, v).as_text()


def test_no_copy_or_transpose_of_the_heads():
    inputs = heads(6, size=64)
    text = jitted(attention, ONE, AttentionSpec(110)).lower(*inputs).compile().as_text()
    assert "gptoss_jax.AttentionGrad" in text and " transpose(" not in text and " copy(" not in text
