"""Writes the golden arrays of this folder with transformers' GptOssForCausalLM.

    pip install torch==2.13.0 'transformers>=5.23,<6' ml_dtypes safetensors numpy
    cd tests && python -m golden.make_golden

These files were written by transformers 5.23.0, torch 2.13.0 and NumPy 2.4.6 on x86-64; each records it.

There is one file per case, in float32 with eager attention and eager experts. The checkpoint is
`helpers.checkpoints.random_checkpoint` for the case and `seed`; its weights have `digest`:

- `tokens` [T], `places`, `logits`: one sequence longer than 5,000 tokens, and its logits at some places;
  `largest` is the largest |logit| of all.
- `batch`, `positions` [B, T], `loss`: the mean cross-entropy of the next tokens, at positions before and
  after 4,096 and 5,000; `norm/NAME` is the norm of its gradient, and `gradient/NAME` the gradient of a small
  tensor or the `projections` of a large one.
- `prompts` [B, longest], -1 after the end, and `continuations`: greedy decoding of a ragged batch.

Seeds are searched for so that no router and no greedy step is so close to a tie that rounding decides it.
"""

import itertools
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from golden import reference
from golden.compare import CASES, SMALL, projections
from helpers.checkpoints import SIZES, random_checkpoint, weights_digest

HERE = pathlib.Path(__file__).parent
LENGTH = 5131
# Closer than this, rounding may decide: for router logits, and for logits relative to the largest one.
ROUTER_GAP = 1e-4
GREEDY_MARGIN = 1e-3
NEW_TOKENS = 64
PROMPT_LENGTHS = (1, 5, 19, 40)
# The first three windows, the original length of YaRN, and the last tokens.
PLACES = [*range(28), 100, 1000, 4094, 4095, 4096, 4097, 4999, 5000, 5001, *range(LENGTH - 4, LENGTH)]


def make(name: str) -> None:
    case = CASES[name]
    vocabulary = SIZES["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        for seed in itertools.count():
            random_checkpoint(folder, case.experts_per_token, case.form, seed, case.dialect)
            model = reference.load(folder, packed=case.form == "mxfp4")
            tokens = np.random.default_rng(seed).integers(0, vocabulary, LENGTH)
            gap = reference.router_gap(model, tokens)
            print(f"{name}: seed {seed}, smallest gap of a router {gap:.1e}", flush=True)
            if gap > ROUTER_GAP:
                break
        digest = weights_digest(folder)
    logits = reference.logits(model, tokens)
    in_pieces = reference.logits(model, tokens, piece=128)
    difference = np.abs(logits - in_pieces).max() / np.abs(logits).max()
    assert difference < 2e-6, f"the reference's cache changes its logits by {difference:.1e}"

    rng = np.random.default_rng(seed + 1)
    batch = rng.integers(0, vocabulary, (3, 77))
    positions = np.array([[0], [4050], [4960]]) + np.arange(77)
    loss, gradients = reference.loss_and_gradients(model, batch, positions)
    norms = {f"norm/{key}": np.float32(np.linalg.norm(g)) for key, g in gradients.items()}
    kept = {
        f"gradient/{key}": g if g.size <= SMALL else projections(key, g).astype(np.float32)
        for key, g in gradients.items()
    }

    prompts, continuations, margins = [], [], []
    for length in PROMPT_LENGTHS:
        while True:
            prompt = rng.integers(0, vocabulary, length)
            alone, margin = reference.greedy(model, [prompt], NEW_TOKENS)
            if margin > GREEDY_MARGIN:
                break
        prompts.append(np.pad(prompt, (0, max(PROMPT_LENGTHS) - length), constant_values=-1))
        continuations.append(alone[0])
        margins.append(margin)
    padded, _ = reference.greedy(model, [p[p >= 0] for p in prompts], NEW_TOKENS)
    assert np.array_equal(padded, continuations), "padding changes what the reference says"
    distinct = [len(set(answer.tolist())) for answer in continuations]
    print(f"{name}: loss {loss:.3f}, greedy margins {np.round(margins, 4)}, distinct tokens {distinct}")

    versions = {module.__name__: module.__version__ for module in (transformers, torch, np)}
    np.savez_compressed(
        HERE / f"{name}.npz",
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        seed=seed,
        digest=digest,
        tokens=tokens.astype(np.uint8),
        places=np.array(PLACES, np.int32),
        logits=logits[PLACES],
        largest=np.abs(logits).max(),
        batch=batch.astype(np.uint8),
        positions=positions.astype(np.int32),
        loss=loss,
        prompts=np.array(prompts, np.int16),
        continuations=np.array(continuations, np.int16),
        **norms,
        **kept,
    )


if __name__ == "__main__":
    for name in CASES:
        make(name)
