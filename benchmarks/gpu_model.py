"""Section of gpu.py: training of the whole model."""

import dataclasses
import itertools
import pathlib
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import percent, print_table, show, spread
from gpu_run import Run

from gptoss_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from gptoss_jax.data.batches import abstract_batch
from gptoss_jax.hardware import flops_per_token, mfu, parameter_counts
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training.state import abstract_state, create_state
from gptoss_jax.training.step import make_train_step

COMMON = ModelConfig(
    vocab_size=32768,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    num_local_experts=32,
    num_experts_per_tok=4,
    router_aux_loss_coef=0.01,
    compute_dtype="bfloat16",
)
MODELS = {
    "1B": dataclasses.replace(COMMON, hidden_size=1152, intermediate_size=1152, num_hidden_layers=8),
    "3B": dataclasses.replace(COMMON, hidden_size=1920, intermediate_size=1920, num_hidden_layers=8),
}
TINY = dataclasses.replace(
    COMMON,
    vocab_size=300,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=5,
    num_experts_per_tok=2,
    sliding_window=8,
    compute_dtype="float32",
)
# (Rows per step, remat), in order of preference; the first that fits is used. Each one that does not fit is
# compiled too, so the first ones are close to 80 GB by `gptoss plan`.
CHOICES = {
    "1B": ((4, "none"), (16, "block"), (8, "block"), (4, "block")),
    "3B": ((8, "block"), (4, "block"), (2, "block")),
    "tiny": ((2, "none"),),
}
WARMUP, STEPS = 3, 10
# Share of the memory that a compiled step may use; the allocator fragments the rest.
MEMORY_UTILIZATION = 0.97


def text(count: int) -> np.ndarray:
    """Returns bytes of Python's standard library as tokens; random tokens would make routing unrealistic."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    parts, length = [], 0
    for path in itertools.cycle(sorted(folder.glob("*.py"))):
        parts.append(np.frombuffer(path.read_bytes(), np.uint8))
        length += len(parts[-1])
        if length >= count:
            return np.concatenate(parts)[:count].astype(np.int32)


def training(run: Run) -> dict:
    """Measures the real training step with AdamW on text, from random weights and with the load-balance loss.
    `load`: rows of the fullest expert over the mean, over all layers and measured steps."""
    models = {"tiny": TINY} if run.smoke else MODELS
    record = {"seq_len": 32 if run.smoke else 4096, "rows": []}
    for name, model in models.items():
        if run.time_left <= 0:
            run.skip(f"training {name}", "no time left")
            continue
        row = run.attempt(f"training {name}", _train, run, name, model, record["seq_len"])
        if row is not None:
            record["rows"].append(row)
    print_table(
        f"Training: AdamW, bfloat16, rows of {record['seq_len']} tokens",
        (
            "model",
            "parameters (active)",
            "rows",
            "remat",
            "tokens/s",
            "MFU",
            "of matmul peak",
            "load",
            "compile s",
        ),
        [
            (
                row["model"],
                f"{row['parameters'] / 1e9:.2f}B ({row['active'] / 1e9:.2f}B)",
                row["rows"],
                row["remat"],
                show(row["tokens_per_second"], 0),
                percent(row["mfu"]),
                percent(row["of_matmul_peak"]),
                f"{row['load']['mean']:.2f}, max {row['load']['max']:.2f}",
                f"{row['compile_seconds']:.0f}",
            )
            for row in record["rows"]
        ],
    )
    return record


def _train(run: Run, name: str, model: ModelConfig, seq_len: int) -> dict:
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    too_large = []
    for rows, remat in CHOICES[name]:
        config = TrainConfig(
            model=dataclasses.replace(model, remat=remat),
            data=DataConfig(seq_len=seq_len, batch_size=rows),
            optim=OptimConfig(warmup_steps=10),
            mesh=MeshConfig(data=1),
            steps=1000,
        )
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            start = time.perf_counter()
            batch = abstract_batch(rows, seq_len, batch_sharding(mesh))
            try:
                step = make_train_step(config).lower(abstract_state(config, mesh), batch).compile()
                seconds, needed = time.perf_counter() - start, _memory(step)
                if limit is None or needed <= MEMORY_UTILIZATION * limit:
                    row = _steps(config, mesh, step)
                    break
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
        too_large.append([rows, remat])
    else:
        raise MemoryError(f"none of {too_large} fits in {limit} bytes")
    total, active = parameter_counts(model)
    flops = flops_per_token(model, seq_len)
    speed = row["tokens_per_second"]["median"] * flops
    return row | {
        "model": name,
        "config": config.model.to_dict(),
        "parameters": total,
        "active": active,
        "rows": rows,
        "remat": remat,
        "too_large": too_large,
        "compile_seconds": seconds,
        "step_memory": needed,
        "useful_flops_per_token": flops,
        "mfu": mfu(speed, jax.devices()[0].device_kind),
        "of_matmul_peak": speed / run.peak,
    }


def _memory(compiled) -> int:
    """Returns the bytes that a compiled step needs; donated arguments count once."""
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes
    )


def _steps(config: TrainConfig, mesh, step) -> dict:
    """Returns tokens/s, losses and expert loads of the steps after the warmup."""
    rows, seq_len = config.data.batch_size, config.data.seq_len
    state = create_state(config, mesh)
    tokens = text((WARMUP + STEPS) * rows * seq_len + 1)
    place = batch_sharding(mesh)
    ones = jax.device_put(np.ones((rows, seq_len), np.int32), place)
    positions = jax.device_put(np.broadcast_to(np.arange(seq_len, dtype=np.int32), (rows, seq_len)), place)
    seconds, losses, loads = [], [], []
    for i in range(WARMUP + STEPS):
        first = i * rows * seq_len
        batch = {
            "tokens": jax.device_put(tokens[first : first + rows * seq_len].reshape(rows, -1), place),
            "targets": jax.device_put(
                tokens[first + 1 : first + 1 + rows * seq_len].reshape(rows, -1), place
            ),
            "segment_ids": ones,
            "positions": positions,
            "loss_weights": ones.astype(jnp.float32),
        }
        jax.block_until_ready(batch)
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        if i >= WARMUP:
            seconds.append(time.perf_counter() - start)
            losses.append(float(metrics["loss"]))
            loads.append(np.asarray(metrics["expert_load"]))
    fullest = np.max(loads, axis=-1) / np.mean(loads, axis=-1)
    return {
        "tokens_per_second": spread([rows * seq_len / s for s in seconds]),
        "loss": [losses[0], losses[-1]],
        "load": {"mean": float(fullest.mean()), "max": float(fullest.max())},
    }
