"""The part "loss" of kernels.py: memory of the loss and its gradients, measured in separate processes."""

import pathlib

import common
import jax
import jax.numpy as jnp
import numpy as np
from workers import Worker

from gptoss_jax.training.losses import chunk_length, cross_entropy

CHUNKS, PLAIN = "in chunks", "all logits"


def peak_resident() -> int:
    """Returns the peak resident bytes. (`getrusage` would start from those of the parent.)"""
    lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def worker(form: str, B: int, T: int, D: int, V: int) -> dict:
    """Starts a worker that computes the loss and its gradients once and returns the bytes that took."""

    def plain(hidden_BTD, head_VD, targets_BT, weights_BT, _):
        logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD)
        chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT) * weights_BT)

    def smooth(*shape):
        # Computed in place: temporaries of random numbers would count as memory from before.
        return jax.jit(lambda: jnp.sin(1.0 + jax.lax.iota(jnp.float32, np.prod(shape))).reshape(shape))()

    def chunked(hidden_BTD, head_VD, *rest):
        return cross_entropy((hidden_BTD,), (head_VD,), *rest)

    loss, chunk = chunked if form == CHUNKS else plain, chunk_length(B, T, V)
    targets_BT = (jnp.arange(B * T, dtype=jnp.int32) * 97 % V).reshape(B, T)
    arguments = jax.block_until_ready((smooth(B, T, D), smooth(V, D) * 0.1, targets_BT, jnp.ones((B, T))))
    program = jax.jit(
        lambda *arguments: jax.value_and_grad(loss, argnums=(0, 1))(*arguments, chunk)
    ).lower(*arguments).compile()  # fmt: skip

    def peak_memory():
        # Resets the peak.
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = peak_resident()
        value, _ = jax.block_until_ready(program(*arguments))
        return {"bytes": peak_resident() - before, "loss": float(value) / (B * T)}

    return {"peak_memory": peak_memory}


def loss(rounds: int, quick: bool) -> dict:
    sizes = {"B": 1, "T": 128, "D": 48, "V": 201_088} if quick else {"B": 4, "T": 512, "D": 384, "V": 201_088}
    found = {CHUNKS: [], PLAIN: []}
    for _ in range(min(rounds, 3)):
        for form, results in found.items():
            process = Worker("loss_memory", "worker", {"form": form} | sizes)
            results.append(process.ask("peak_memory"))
            process.close()
    logits = 4 * sizes["B"] * sizes["T"] * sizes["V"]
    rows = [
        {"form": form, "bytes": common.spread([one["bytes"] for one in results]), "loss": results[0]["loss"]}
        for form, results in found.items()
    ]
    common.print_table(
        "Loss and gradients, {B} x {T} tokens, D {D}, V {V:,}: ".format(**sizes)
        + f"one array of logits is {logits / 1e9:.2f} GB",
        ("", "additional GB", "nats per token"),
        [
            (row["form"], common.show({k: v / 1e9 for k, v in row["bytes"].items()}), f"{row['loss']:.5f}")
            for row in rows
        ],
    )
    saved = (rows[1]["bytes"]["median"] - rows[0]["bytes"]["median"]) / logits
    return sizes | {
        "logits": logits,
        "rows": rows,
        "bounds": [common.bounded("saved / logits", saved, least=1.0)],
    }
