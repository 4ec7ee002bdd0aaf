"""`gptoss plan` for adapters beside frozen weights: sizes counted by hand, and arguments of real steps."""

import dataclasses
import re

import jax
import pytest
from helpers.tpu_compiler import needs_libtpu

from gptoss_jax.checkpoints.load import load_target
from gptoss_jax.cli import main
from gptoss_jax.config import (
    SLIDING,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from gptoss_jax.data.batches import abstract_batch
from gptoss_jax.hardware import CHIPS
from gptoss_jax.model.lora import adapter_counts, is_adapter
from gptoss_jax.parallel.mesh import AXES, make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.planning.estimate import Estimate, estimate
from gptoss_jax.planning.plan import make_plan
from gptoss_jax.training.base_weights import base_config
from gptoss_jax.training.state import abstract_state
from gptoss_jax.training.step import make_train_step

CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=112,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        num_local_experts=12,
        num_experts_per_tok=3,
        sliding_window=8,
        remat="block",
        compute_dtype="bfloat16",
        expert_format="mxfp4",
        lora=LoraConfig(rank=5, expert_rank=2),
    ),
    data=DataConfig(seq_len=128, batch_size=16),
)
# q and out 5 * (64 + 128), k and v 5 * (64 + 64); 12 experts 2 * (64 + 192) and 2 * (96 + 64).
ADAPTERS = 2 * (2 * 960 + 2 * 640 + 12 * (512 + 320))
# In each layer projections 24576 with biases 320, sinks 8, norms 128, router 780, biases of experts 2304 and
# 768; two embeddings and the last norm.
OTHERS = 2 * (24576 + 320 + 8 + 128 + 780 + 2304 + 768) + 2 * 112 * 64 + 64
EXPERTS = 2 * 12 * 3 * 64 * 96


def with_model(**changes) -> TrainConfig:
    return dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **changes))


def mesh_of(*sizes: int) -> dict[str, int]:
    return dict.fromkeys(AXES, 1) | dict(zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True))


def on(config: TrainConfig, *sizes: int) -> Estimate:
    return estimate(config, CHIPS["v5p"], mesh_of(*sizes))


def test_memory_of_adapters_and_frozen_weights():
    assert sum(adapter_counts(CONFIG.model).values()) == ADAPTERS == 26368
    packed, plain = on(CONFIG, 1, 1, 1, 1).memory, on(with_model(expert_format="plain"), 1, 1, 1, 1).memory
    assert packed.parameters == plain.parameters == packed.gradients == 4 * ADAPTERS
    # Beside the two moments: counters and a key.
    assert 0 < packed.optimizer - 2 * packed.parameters < 50
    assert plain.frozen == 2 * (OTHERS + EXPERTS) == 1_029_072
    # 4.25 bits.
    assert packed.frozen == 2 * OTHERS + EXPERTS * 17 // 32 == 379_344
    # One layer's experts are read from the stack if they are plain.
    assert plain.temporaries - packed.temporaries == EXPERTS // 2 * 2
    assert packed.total == sum(dataclasses.astuple(packed))
    half = on(dataclasses.replace(CONFIG, optim=OptimConfig(grad_accum_steps=2)), 1, 1, 1, 1).memory
    assert half.gradients == 2 * packed.gradients
    full = on(with_model(expert_format="plain", lora=None), 1, 1, 1, 1).memory
    assert full.parameters == full.gradients == 4 * (OTHERS + EXPERTS) and full.frozen == 0
    wide = on(with_model(compute_dtype="float32"), 1, 1, 1, 1).memory
    assert wide.frozen == 4 * OTHERS + EXPERTS * 17 // 32


def test_activations_of_adapters():
    def kept(config):
        return on(config, 2, 1, 1, 1).memory.activations

    tokens = 8 * 128
    assert kept(CONFIG) == 2 * tokens * 64 * 2
    # Outputs of q, k, v and out, what is between the factors of their adapters, and the router's logits.
    assert kept(with_model(remat="dots")) - kept(CONFIG) == 2 * tokens * ((64 + 256 + 4 * 5) * 2 + 12 * 4)
    # Without adapters in the experts, neither their input nor the product of gate and up is needed.
    every, attention = (
        kept(with_model(remat="none", lora=LoraConfig(rank=5, expert_rank=2, targets=targets)))
        for targets in (("q", "gate_up", "down"), ("q",))
    )
    assert every - attention == 2 * tokens * 3 * (64 + 96 + 2 * 2) * 2


def test_collectives_of_adapters():
    sent = {cost.purpose: cost.sent for cost in on(CONFIG, 1, 2, 1, 1).collectives}
    # Of each layer: attention's matrices and router in bfloat16, packed bytes, the adapters' sides along D.
    sides = 4 * 5 * 64 + 2 * 12 * 2 * 64
    layer = 2 * (24576 + 64 * 12 + sides) + EXPERTS // 2 * 17 // 32
    assert sent["gather parameters"] == (2 * 2 * layer + 2 * 2 * 112 * 64) / 2 == 368_128
    assert sent["scatter gradients"] == 2 * 2 * sides / 2
    assert sent["sum gradients"] == 2 * (ADAPTERS - 2 * sides)
    assert sent.keys() == {"gather parameters", "scatter gradients", "sum gradients"}
    sent = {(cost.purpose, cost.kind): cost.sent for cost in on(CONFIG, 1, 1, 1, 2).collectives}
    # Three passes of two layers: 3 experts' rows of 96 and 64 values, for each of 2048 tokens.
    assert sent["gather expert rows", "all-gather"] == 2048 * 3 * (96 + 64) * 2 * 3 * 2 / 2
    assert sent["sum over tensor", "all-reduce"] == 2048 * 64 * 2 * (3 * 2 + 2)


@pytest.mark.slow
def test_arguments_of_a_compiled_step():
    # One kind of layer, and no second forward pass to compile.
    config, sizes = with_model(layer_types=(SLIDING,) * 2, remat="none"), (1, 2, 2, 2)
    mesh = make_mesh(MeshConfig(**mesh_of(*sizes)))
    batch = abstract_batch(16, 128, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        state = abstract_state(config, mesh, is_adapter)
        frozen = load_target(base_config(config.model), mesh, "bfloat16")
        program = make_train_step(config).lower(state, batch, frozen).compile()
    memory = on(config, *sizes).memory
    # Beside them five arrays of 4 bytes, which four devices split.
    held = memory.parameters + memory.optimizer + memory.frozen
    assert program.memory_analysis().argument_size_in_bytes == held + 5 * 4 * 16 * 128 // 4


def test_report(capsys, tmp_path):
    preset = tmp_path / "adapters.py"
    preset.write_text(
        f"from gptoss_jax.config import TrainConfig\nconfig = TrainConfig.from_dict({CONFIG.to_dict()})"
    )
    assert main.main(["plan", str(preset), "--chip", "h200", "--devices", "2"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    assert "514.5K parameters" in shown and "frozen; 26.4K trained" in " ".join(shown.split())
    assert "frozen trained optim grad" in shown and "It omits dequantizing MXFP4." in " ".join(shown.split())


def test_memory_of_rollouts(capsys):
    """Keys and values of the answers of a step, by hand: half of the layers keep 128 tokens of them."""
    flags = ["--chip", "h100", "--devices", "1", "--data.batch-size", "16", "--optim.grad-accum-steps", "16"]
    assert main.main(["plan", "grpo_qlora_20b", *flags]) == 0
    said = " ".join(capsys.readouterr().out.split())
    (size,) = re.findall(
        r"sampling 16 answers needs ([\d.]+) GB per device for keys, values and logits", said
    )
    keys_and_values = 16 * 12 * (2048 + 128) * 2 * 8 * 64 * 2 / 1e9
    logits = 4 * 16 * 201_088 * 4 / 1e9
    assert keys_and_values + logits < float(size) < 4 * (keys_and_values + logits)


@needs_libtpu
def test_a_step_of_adapters_is_compiled():
    # One chip, and widths that the compiler does not pad.
    sizes = {"hidden_size": 256, "intermediate_size": 128}
    config = with_model(layer_types=(SLIDING,) * 2, remat="none", **sizes)
    plan = make_plan(config, topology="v5p:1x1x1")
    (one,), (guess,) = plan.compiled, plan.estimates
    assert plan.devices == 1 and one.fits and one.refusal == ""
    memory = guess.memory
    exact = memory.parameters + memory.optimizer + memory.frozen + 5 * 4 * 16 * 128
    assert exact <= one.arguments < 1.5 * exact
    assert one.aliased > 0.9 * one.outputs and one.outputs < 4 * memory.parameters * 1.5
