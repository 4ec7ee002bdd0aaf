"""Compile time by depth: python benchmarks/compile_time.py [--layers 4 36].

Seconds to trace, lower and compile the training step of gpt-oss-120b scaled down to width 256 and 8 experts,
with 4 and 36 layers, stacked and scanned. Nothing is allocated or run, caches are cleared before each
compilation, and the depths alternate. The ratio of the medians should be at most 1.3. Shows medians
(min–max); writes results/compile_time.json.
"""

import dataclasses
import pathlib
import time

import jax
from common import base_parser, bounded, print_table, show, spread, write_json

from gptoss_jax.config import MeshConfig
from gptoss_jax.config.preset import read_preset
from gptoss_jax.data.batches import abstract_batch
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training.state import abstract_state
from gptoss_jax.training.step import make_train_step

PRESET = pathlib.Path(__file__).parents[1] / "configs" / "gpt_oss_120b.py"
SCALED = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
}
BOUND = 1.3


def compile_step(config, layers: int) -> float:
    """Returns the seconds that compilation takes."""
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_hidden_layers=layers, **SCALED),
        data=dataclasses.replace(config.data, batch_size=1, seq_len=512),
        mesh=MeshConfig(data=1),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    batch = abstract_batch(1, config.data.seq_len, batch_sharding(mesh))
    jax.clear_caches()
    with jax.set_mesh(mesh):
        state = abstract_state(config, mesh)
        start = time.perf_counter()
        make_train_step(config).lower(state, batch).compile()
    return time.perf_counter() - start


def make_parser():
    parser = base_parser(__doc__, rounds=5)
    parser.add_argument("--layers", type=int, nargs=2, default=(4, 36), help="the two depths (default: 4 36)")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    rounds, config = 1 if options.quick else options.rounds, read_preset(PRESET)
    # The first compilation also loads modules of jax.
    compile_step(config, options.layers[0])
    seconds = {layers: [] for layers in options.layers}
    for _ in range(rounds):
        for layers, values in seconds.items():
            values.append(compile_step(config, layers))
    found = {layers: spread(values) for layers, values in seconds.items()}
    print_table(
        "Tracing, lowering and compiling the training step",
        ("layers", "seconds"),
        [(layers, show(values)) for layers, values in found.items()],
    )
    few, many = (found[layers]["median"] for layers in options.layers)
    bound = bounded(f"{options.layers[1]} layers / {options.layers[0]} layers", many / few, BOUND)
    if not options.quick:
        rows = [{"layers": layers, "seconds": values} for layers, values in found.items()]
        record = {"settings": {"rounds": rounds, "sizes": SCALED}, "rows": rows, "bounds": [bound]}
        print(write_json("compile_time", record))


if __name__ == "__main__":
    main()
