"""Cost of more experts at equal work per token, float32 on CPU: python benchmarks/experts.py [--experts N
...].

2,048 tokens of width 384, each routed to four experts of width 960, with 4 to 128 experts: one expert layer,
forward and backward with fixed uneven routing, and a training step of a model with two such layers. The limit
is the matmul peak of the same run (2,048^3, alternating with the rest). Except for the router's, useful
operations do not depend on E; what grows is the optimizer's work and the number of ever smaller matmuls.

All sizes alternate, so all are in memory together: 10 GB. Shows medians (min–max); writes
results/experts.json.
"""

import functools

import common
import jax
from common import PEAK, Training, percent, show, small_model, spread

from gptoss_jax.hardware import flops_per_token
from gptoss_jax.model.moe import SwiGLU, expert_outputs, top_experts
from gptoss_jax.model.parameters import LETTERS
from gptoss_jax.parallel.expert_parallel import Routing, apply_experts

EXPERTS = (4, 8, 16, 32, 64, 128)
TOP_K = 4
LAYER, STEP = "layer", "training step"


def layer_call(model, M: int):
    """Returns a call of one expert layer, with gradients of tokens, routing weights, matrices and biases."""
    D, E, F = model.hidden_size, model.num_local_experts, model.intermediate_size
    shapes = {"gate_up": (E, D, 2, F), "down": (E, F, D), "gate_up_bias": (E, 2, F), "down_bias": (E, D)}
    keys = iter(jax.random.split(jax.random.key(0), 8))
    parameters = {name: 0.02 * jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    x_MD, g_MD = (jax.random.normal(next(keys), (M, D)) for _ in range(2))
    # A bias per expert makes the routing uneven.
    logits_ME = jax.random.normal(next(keys), (M, E)) + 0.5 * jax.random.normal(next(keys), (E,))
    experts_MX, weights_MX = top_experts(logits_ME, model.num_experts_per_tok)

    swiglu = SwiGLU(model.swiglu_alpha, model.swiglu_limit, model.swiglu_up_offset)
    experts = functools.partial(expert_outputs, swiglu)
    letters = {name: LETTERS[f"moe.{name}"] for name in parameters}

    def layer(x_MD, weights_MX, parameters, experts_MX):
        routing = Routing(experts_MX, weights_MX)
        return apply_experts(experts, x_MD, routing, parameters, letters)[0]

    return functools.partial(
        common.with_gradients(layer), g_MD, (x_MD, weights_MX, parameters), (experts_MX,)
    )


def make_parser():
    parser = common.base_parser(__doc__, rounds=7)
    parser.add_argument(
        "--experts",
        type=int,
        nargs="+",
        default=EXPERTS,
        help="numbers of experts (default: 4 8 16 32 64 128)",
    )
    return parser


def main() -> None:
    options = make_parser().parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows, length = (1, 128) if options.quick else (4, 512)
    counts, M = options.experts[:2] if options.quick else options.experts, rows * length
    calls, flops = {PEAK: common.square_matmul()}, {}
    for E in counts:
        model = small_model(num_local_experts=E, num_experts_per_tok=TOP_K)
        # Three D x F matmuls for each expert of a token; backward is twice forward.
        flops[LAYER, E] = 3 * 2 * 3 * M * TOP_K * model.hidden_size * model.intermediate_size
        flops[STEP, E] = M * flops_per_token(model, length)
        calls[LAYER, E] = layer_call(model, M)
        calls[STEP, E] = Training(model, rows, length).step
    seconds = common.alternate(calls, options.rounds)
    peak, found = common.flops_per_second(seconds.pop(PEAK)), []
    for (what, E), values in sorted(seconds.items()):
        row = {"what": what, "E": E, "seconds": spread(values), "flops": flops[what, E]}
        row["tokens_per_second"] = spread([M / one for one in values])
        row["flops_per_second"] = common.flops_per_second(values, flops[what, E])
        found.append(row | {"of_peak": row["flops_per_second"]["median"] / peak["median"]})
    common.print_table(
        f"{M} tokens, top-{TOP_K}, D 384, F 960; matmul peak {peak['median'] / 1e9:,.0f} GFLOP/s",
        ("what, E", "ms", "tokens/s", "useful GFLOP/s", "of the peak"),
        [
            (
                f"{row['what']}, {row['E']}",
                common.milliseconds(row["seconds"]),
                show(row["tokens_per_second"], 0),
                f"{row['flops_per_second']['median'] / 1e9:.1f}",
                percent(row["of_peak"]),
            )
            for row in found
        ],
    )
    if not options.quick:
        settings = {"rounds": options.rounds, "batch": rows, "length": length, "top_k": TOP_K}
        print(common.write_json("experts", {"settings": settings, "peak": peak, "rows": found}))


if __name__ == "__main__":
    common.keep_memory()
    main()
