"""Figures of the TPU compiler for the kernels: python benchmarks/tpu_compile.py [--only TEXT].

Needs libtpu but no TPU. Compiles attention and the grouped matmul of gpt-oss-20b, and a sliding and a full
layer with these kernels, for one device of each kind; decoding and prefill of all of gpt-oss-20b with MXFP4
experts in bfloat16 and a cache of 4,096 tokens, on one device and on four of the tensor axis; and decoding 8
sequences with 32,768 tokens on v5p. Prints the compiler's figures and writes them to
results/tpu_compile.json; a dash is a figure that it could not compute. The compiler does not look into
kernels: operations of attention are not counted, and the bytes of grouped matmul kernels are an upper bound,
as is the time derived from them.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import time

# Lets several processes use libtpu on a machine without TPUs.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.checkpoints import load
from gptoss_jax.config import MeshConfig
from gptoss_jax.config.preset import read_preset
from gptoss_jax.inference import slots
from gptoss_jax.kernels.attention.pallas_tpu import splash_attention
from gptoss_jax.kernels.attention.reference import AttentionSpec
from gptoss_jax.kernels.grouped_matmul.pallas_tpu import megablox_grouped_matmul
from gptoss_jax.model.kv_cache import KVCache, init_cache
from gptoss_jax.parallel import rules
from gptoss_jax.parallel.mesh import make_mesh

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "tpu_compile.json"
TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
T, N, K, H, D, F, W = 4096, 64, 8, 64, 2880, 2880, 128  # of the released models
TOKENS, X = 16384, 4  # rows of the grouped matmul: TOKENS times X


def attention(window):
    def forward(q, k, v, segments, sinks, _):
        return splash_attention(q, k, v, segments, segments, AttentionSpec(window), sinks_N=sinks)

    shapes = [(1, T, n, H) for n in (N, K, K)]
    return forward, [*shapes, ((1, T), "int32"), ((N,), "float32"), (1, T, N, H)], (0, 1, 2, 4)


def grouped(implementation, experts, width, outputs):
    def forward(x, w, sizes, _):
        return implementation(x, w, sizes)

    R = TOKENS * X
    return forward, [(R, width), (experts, width, outputs), ((experts,), "int32"), (R, outputs)], (0, 1)


def with_gradients(forward, arguments):
    """Returns a function of the result and the gradients of `arguments`; its last input is the cotangent."""

    def both(*inputs):
        def of(*chosen):
            changed = dict(zip(arguments, chosen, strict=True))
            return forward(*(changed.get(i, x) for i, x in enumerate(inputs)))

        out, vjp = jax.vjp(of, *(inputs[i] for i in arguments))
        return out, *vjp(inputs[-1])

    return both


def programs() -> dict:
    """Returns (function, shapes, useful operations) by name; operations only of the grouped matmul."""
    found = {}
    for window in (W, None):
        forward, shapes, arguments = attention(window)
        name = f"attention, {'window ' + str(window) if window else 'full'}"
        found[name] = forward, shapes, None
        found[name + ", + gradients"] = with_gradients(forward, arguments), shapes, None
    for experts in (32, 16):
        for name, width, outputs in (("gate_up", D, 2 * F), ("down", F, D)):
            for implementation in (megablox_grouped_matmul, jax.lax.ragged_dot):
                forward, shapes, arguments = grouped(implementation, experts, width, outputs)
                line = f"{name}, {experts} experts, {implementation.__name__.split('_')[0]}"
                work = 2 * TOKENS * X * width * outputs
                found[line] = forward, shapes, work
                found[line + ", + gradients"] = with_gradients(forward, arguments), shapes, 3 * work
    return found


def pair_of_layers(place):
    """Returns a step of a sliding and a full layer of gpt-oss-20b on one row, bfloat16, and its arguments."""
    from flax import nnx

    from gptoss_jax.model.transformer import Transformer

    published = read_preset(HERE.parent / "configs" / "gpt_oss_20b.py").model
    config = dataclasses.replace(published, num_hidden_layers=2, vocab_size=128, remat="none")
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def step(params, tokens, d_out):
        out, vjp = jax.vjp(lambda params: nnx.merge(graphdef, params).hidden_states(tokens)[0], params)
        return vjp(d_out.astype(out.dtype))

    def shaped(x):
        return jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=place)

    tokens = jax.ShapeDtypeStruct((1, T), "int32", sharding=place)
    d_out = shaped(jax.ShapeDtypeStruct((1, T, D), "bfloat16"))
    return jax.jit(step), (jax.tree.map(shaped, params), tokens, d_out)


def generation(mesh, batch, tokens, cache_len=4096):
    """Returns a prefill of gpt-oss-20b or, for one token, a decode call, and arguments placed as
    `from_pretrained` does."""
    published = read_preset(HERE.parent / "configs" / "gpt_oss_20b.py").model
    config = dataclasses.replace(published, expert_format="mxfp4", compute_dtype="bfloat16")
    params = load.load_target(config, mesh, "bfloat16")

    def array(*shape, dtype="int32", spec=None):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec or P()))

    cache = jax.eval_shape(lambda: init_cache(config, batch, cache_len, "bfloat16"))
    layers = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype, spec=rules.CACHE_LBKSH), cache.layers)
    cache = KVCache(layers, array(batch))
    if tokens > 1:
        row = jax.tree.map(lambda x: array(x.shape[0], 1, *x.shape[2:], dtype=x.dtype), layers)
        tokens_BT, rows = array(batch, tokens), [KVCache(row, array(1))] * batch
        read = functools.partial(slots.prefill, batch=batch, has_logprobs=False)
        return jax.jit(read, static_argnums=0), (config, params, rows, tokens_BT, tokens_BT, array(batch))
    state = jax.eval_shape(lambda: slots.init_slots(config, batch, 256))
    state = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), state)
    state = dataclasses.replace(state, cache=cache)
    allowed_BU = array(*state.requests.stop_mask.shape)
    flags_B = array(batch, dtype="bool")
    return slots.decode, (config, params, state, array(), allowed_BU, (flags_B, flags_B))


def measure(function, arguments) -> dict:
    start = time.monotonic()
    try:
        program = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return {"refusal": str(error).splitlines()[0]}
    cost, memory = program.cost_analysis(), program.memory_analysis()

    def positive(name):
        # A negative cost is one that the compiler could not compute.
        value = cost.get(name)
        return value if value is not None and value > 0 else None

    return {
        "flops": positive("flops"),
        "bytes": positive("bytes accessed"),
        "optimal_seconds": positive("optimal_seconds"),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "compile_seconds": round(time.monotonic() - start, 1),
    }


def keep(row: dict) -> None:
    """Writes a row to the file, replacing an older one of the same program."""
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "libtpu")}
    row = row | {"date": time.strftime("%Y-%m-%d"), "versions": versions}
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    rows = [other for other in rows if any(other[key] != row[key] for key in ("chip", "program"))]
    RESULTS.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")


def show(row: dict) -> str:
    def in_unit(name, unit):
        value = row.get(name)
        return "–" if value is None else f"{value / unit:,.2f}"

    work = "–" if not row.get("useful_flops") else f"{row['flops'] / row['useful_flops']:,.2f}"
    columns = (
        ("flops", 1e12),
        ("bytes", 1e9),
        ("optimal_seconds", 1e-3),
        ("arguments", 1e9),
        ("temporaries", 1e9),
        ("peak", 1e9),
    )
    cells = [in_unit(name, unit) for name, unit in columns] + [in_unit("code", 1e6)]
    cells = [cells[0], work, *cells[1:]] if "refusal" not in row else [row["refusal"]]
    return f"| {row['chip']} | {row['program']} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only chips and programs whose line contains this")
    options = parser.parse_args()
    print(
        "| chip | program | TFLOP | of useful | GB accessed | least ms "
        "| arguments GB | temporary GB | peak GB | code MB |"
    )
    print("| --- | --- |" + " ---: |" * 8)
    for name in TPUS:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        place = jax.sharding.SingleDeviceSharding(devices[0])
        one, four = (make_mesh(MeshConfig(data=1, tensor=n), devices[:n]) for n in (1, 4))

        def arrays(shapes, place=place):
            pairs = [shape if isinstance(shape[0], tuple) else (shape, "bfloat16") for shape in shapes]
            return [jax.ShapeDtypeStruct(*pair, sharding=place) for pair in pairs]

        jobs = {
            key: (lambda job=job: (jax.jit(job[0]), arrays(job[1])), job[2], None)
            for key, job in programs().items()
        }
        layers = functools.partial(pair_of_layers, NamedSharding(one, P()))
        jobs["two layers, + gradients"] = layers, None, one
        for what, batch, tokens in (("decoding", 1, 1), ("decoding", 8, 1), ("prefill of 512", 1, 512)):
            for mesh in (one, four):
                key = f"gpt-oss-20b, {what}, batch {batch}, {mesh.size} device{'s' * (mesh.size > 1)}"
                jobs[key] = functools.partial(generation, mesh, batch, tokens), None, mesh
        if name.startswith("v5p"):
            key = "gpt-oss-20b, decoding, batch 8, 1 device, cache of 32,768 tokens"
            jobs[key] = functools.partial(generation, one, 8, 1, 32768), None, one
        for key, (job, work, mesh) in jobs.items():
            row = {"chip": name.split(":")[0], "program": key, "useful_flops": work}
            if options.only not in f"{row['chip']} {key}":
                continue
            # The model asks the mesh for the backend; the kernels do not need it.
            with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                row |= measure(*job())
            keep(row)
            print(show(row), flush=True)


if __name__ == "__main__":
    main()
