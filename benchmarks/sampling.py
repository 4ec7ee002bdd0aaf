"""Sampling against sorting the vocabulary: python benchmarks/sampling.py.

Vocabularies of 4,096 and 201,088 (gpt-oss), 1 and 8 sequences, random logits with a standard deviation of 3.
The peer is `sampling_reference.filter_logits`, which sorts, followed by `jax.random.categorical` and
`jax.lax.argmax`. Both draw the same tokens. The two alternate; the ratio is the median of the rounds' ratios,
the peer's time over ours. Shows milliseconds as medians (min–max); writes results/sampling.json.
"""

import functools
import statistics

import common
import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.inference import sampling, sampling_reference
from gptoss_jax.inference.sampling_params import SamplingParams

VOCABULARIES, BATCHES = (4096, 201_088), (1, 8)
OURS, SORTED = "ours", "sorted"
SETTINGS = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top-k 50": {"temperature": 1.0, "top_k": 50},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top-k 50, top-p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
}


def sorted_sample(logits_BV, key_B, settings, filters: bool, draws: bool):
    """Draws tokens, int32 [B]; sorts if `filters`, draws random numbers if `draws`."""
    greedy_B = jax.lax.argmax(logits_BV, 1, jnp.int32)
    if not draws:
        return greedy_B
    filtered_BV = sampling_reference.filter_logits(logits_BV, settings) if filters else logits_BV
    sampled_B = jax.vmap(jax.random.categorical)(key_B, filtered_BV).astype(jnp.int32)
    return jnp.where(settings.temperature == 0, greedy_B, sampled_B)


def measure(V: int, B: int, name: str, rounds: int) -> dict:
    arguments = (
        3 * jax.random.normal(jax.random.key(0), (B, V)),
        sampling.sequence_keys(jnp.arange(B, dtype=jnp.uint32)),
        sampling.SamplingSettings.of([SamplingParams(**SETTINGS[name])] * B),
    )
    draws, filters = name != "greedy", name.startswith("top")
    calls = {
        OURS: functools.partial(jax.jit(sampling.sample), *arguments),
        SORTED: functools.partial(
            jax.jit(functools.partial(sorted_sample, filters=filters, draws=draws)), *arguments
        ),
    }
    np.testing.assert_array_equal(calls[OURS](), calls[SORTED]())
    seconds = common.alternate(calls, rounds)
    ratio = statistics.median(b / a for a, b in zip(seconds[OURS], seconds[SORTED], strict=True))
    return {"V": V, "B": B, "settings": name, "seconds": seconds, "ratio": ratio}


def make_parser():
    return common.base_parser(__doc__, rounds=15)


def main() -> None:
    options = make_parser().parse_args()
    jax.config.update("jax_platforms", "cpu")
    vocabularies, rounds = ((300,), 2) if options.quick else (VOCABULARIES, options.rounds)
    results = [measure(V, B, name, rounds) for V in vocabularies for B in BATCHES for name in SETTINGS]
    common.print_table(
        f"Milliseconds to sample a token of each sequence, {rounds} rounds",
        ("vocabulary, sequences, settings", OURS, SORTED, "ratio"),
        [
            (
                f"{row['V']:,}, {row['B']}, {row['settings']}",
                *(common.milliseconds(common.spread(row["seconds"][side])) for side in (OURS, SORTED)),
                f"{row['ratio']:.2f}",
            )
            for row in results
        ],
    )
    if not options.quick:
        print(common.write_json("sampling", {"rounds": rounds, "results": results}))


if __name__ == "__main__":
    main()
