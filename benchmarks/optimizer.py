"""AdamW with clipping against memory bandwidth: python benchmarks/optimizer.py.

The parameters are those of 6 layers of width 384 with 128 experts, 850M in float32; with gradients and both
moments, 13.6 GB. The norm reads the gradients once; the update reads parameters, gradients and moments, and
writes all but the gradients: 32 bytes per parameter in all. Compares the C++ kernels and plain XLA with a
copy in threads of memory that no cache holds; a copy counts as a read and a write.

Shows GB/s as medians (min–max), and the share of the copy's; writes the seconds of all rounds to
results/optimizer.json.
"""

import functools

import jax
import jax.numpy as jnp
from common import alternate, base_parser, percent, print_table, show, small_model, spread, write_json
from decode_limit import COPY, readers

from gptoss_jax.config import OptimConfig
from gptoss_jax.kernels import selection
from gptoss_jax.model.parameters import tree_bytes
from gptoss_jax.model.transformer import abstract_params
from gptoss_jax.training.optimizer import apply_gradients, global_norm, make_optimizer

WORDS = 8  # Reads and writes per parameter
COPIED, PASSES = 1 << 30, 16
STEPS = 1000


def updates(experts: int) -> tuple[int, dict]:
    """Returns the bytes of the parameters, and functions by name that update them in place."""
    config = OptimConfig()
    shapes = abstract_params(small_model(num_local_experts=experts, num_hidden_layers=6))
    full = jax.jit(lambda value: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), shapes))
    gradients = full(0.01)
    state = {"params": full(0.02)}
    state["opt_state"] = jax.jit(make_optimizer(config, STEPS).init)(state["params"])

    def update(setting, params, opt_state, gradients):
        with selection.using(setting):
            norm = global_norm(gradients)
            finite = jnp.isfinite(norm)
            return apply_gradients(config, STEPS, params, opt_state, gradients, norm=norm, finite=finite)

    def run(program):
        state["params"], state["opt_state"] = program(state["params"], state["opt_state"], gradients)
        return state["params"]

    settings = {"C++ kernels": "auto", "plain XLA": "plain"}
    functions = {}
    for name, setting in settings.items():
        program = jax.jit(functools.partial(update, setting), donate_argnums=(0, 1))
        functions[name] = functools.partial(run, program)
    return tree_bytes(shapes), functions


def main() -> None:
    options = base_parser(__doc__, rounds=5).parse_args()
    nbytes, functions = updates(4 if options.quick else 128)
    functions[COPY] = readers(COPIED, PASSES)[COPY]
    seconds = alternate(functions, options.rounds)
    moved = {name: PASSES * COPIED if name == COPY else WORDS * nbytes for name in functions}
    speeds = {name: spread([moved[name] / one / 1e9 for one in seconds[name]]) for name in functions}
    shares = {name: speed["median"] / speeds[COPY]["median"] for name, speed in speeds.items()}
    print_table(
        f"AdamW with clipping, {nbytes / 4e6:,.0f}M parameters, {options.rounds} rounds",
        ("", "GB/s", "share of the copy"),
        [(name, show(speed), percent(shares[name])) for name, speed in speeds.items()],
    )
    if not options.quick:
        results = {"parameter_bytes": nbytes, "moved_bytes": moved, "seconds": seconds}
        print(write_json("optimizer", results | {"gigabytes_per_second": speeds, "shares": shares}))


if __name__ == "__main__":
    main()
