"""Training steps of us and of transformers, alternately: python benchmarks/train_vs_transformers.py.

The sizes of a student's notebook (6 layers of width 384) with 4, 32 and 128 experts, batch 4 x 512, float32,
AdamW with clipping, two threads each. Prints tokens/s, the ratio of the medians, and how much of the matmul
peak, measured in the same run, our steps reach.
"""

import argparse
import statistics
import time

from workers import Worker

# Experts and experts per token.
SIZES = ((4, 2), (32, 4), (128, 4))
IMPLEMENTATIONS = ("eager", "grouped_mm")
ROWS, LENGTH, VOCABULARY = 4, 512, 4096
THREADS = 2


def model_sizes(experts: int, top_k: int) -> dict:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 384,
        "intermediate_size": 960,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "sliding_window": 256,
        "tie_word_embeddings": True,
    }


def tokens():
    import numpy as np

    return np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH + 1)).astype(np.int32)


def ours(experts: int, top_k: int) -> dict:
    import jax
    import jax.numpy as jnp

    from gptoss_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
    from gptoss_jax.parallel.mesh import make_mesh
    from gptoss_jax.training.flops import flops_per_token
    from gptoss_jax.training.state import create_state
    from gptoss_jax.training.step import make_train_step

    model = ModelConfig(
        **model_sizes(experts, top_k),
        rope_theta=10000.0,
        rope_scaling=None,
        compute_dtype="float32",
        scan_layers=False,
    )
    config = TrainConfig(
        model=model, data=DataConfig(seq_len=LENGTH, batch_size=ROWS), optim=OptimConfig(), steps=10_000
    )
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    rows = tokens()
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
    batch |= {"segment_ids": jnp.ones((ROWS, LENGTH), jnp.int32)}
    batch |= {"positions": jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))}
    with jax.set_mesh(mesh):
        state = create_state(config, mesh)
        step = make_train_step(config)

    def one_step() -> float:
        nonlocal state
        began = time.perf_counter()
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch)
        metrics["loss"].block_until_ready()
        jax.block_until_ready(state)
        return time.perf_counter() - began

    square = jnp.ones((2048, 2048), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    multiply(square).block_until_ready()

    def peak() -> float:
        began = time.perf_counter()
        multiply(square).block_until_ready()
        return 2 * 2048**3 / (time.perf_counter() - began)

    one_step()
    one_step()
    return {"step": one_step, "peak": peak, "flops": lambda: flops_per_token(model, LENGTH)}


def transformers(experts: int, top_k: int, implementation: str) -> dict:
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = GptOssConfig(
        **model_sizes(experts, top_k),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
        experts_implementation=implementation,
    )
    model = GptOssForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    rows = torch.as_tensor(tokens(), dtype=torch.int64)

    def one_step() -> float:
        began = time.perf_counter()
        logits = model(rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - began

    one_step()
    one_step()
    return {"step": one_step}


def measure(experts: int, top_k: int, rounds: int, implementations) -> dict:
    sizes = {"experts": experts, "top_k": top_k}
    module = "train_vs_transformers"
    us = Worker(module, "ours", sizes)
    peers = {
        name: Worker(
            module, "transformers", sizes | {"implementation": name}, GLIBC_TUNABLES="glibc.malloc.hugetlb=1"
        )
        for name in implementations
    }
    seconds = {name: [] for name in ("ours", *peers)}
    peaks = []
    for _ in range(rounds):
        peaks.append(us.ask("peak"))
        seconds["ours"].append(us.ask("step"))
        for name, worker in peers.items():
            seconds[name].append(worker.ask("step"))
    flops = us.ask("flops")
    for worker in (us, *peers.values()):
        worker.close()
    return {"experts": experts, "top_k": top_k, "seconds": seconds, "peaks": peaks, "flops_per_token": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="*", default=[e for e, _ in SIZES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="*", default=list(IMPLEMENTATIONS))
    options = parser.parse_args()
    for experts, top_k in SIZES:
        if experts not in options.experts:
            continue
        result = measure(experts, top_k, options.rounds, options.peers)
        count = ROWS * LENGTH
        medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
        peak = statistics.median(result["peaks"])
        share = result["flops_per_token"] * count / medians["ours"] / peak
        print(
            f"E {experts} top-{top_k}: " + ", ".join(f"{n} {count / s:,.0f}" for n, s in medians.items()),
            end=" ",
        )
        best = min((s for n, s in medians.items() if n != "ours"), default=0)
        print(
            f"tokens/s; ratio {best / medians['ours']:.2f}; peak {peak / 1e9:.0f} GFLOP/s, ours {share:.0%}"
        )


if __name__ == "__main__":
    main()
