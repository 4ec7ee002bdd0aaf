"""gpt-oss-20b as published: 24 layers, 32 experts, 4 experts per token.

Learning rate and steps are for training on from the released weights (`init_from`). Parameters, gradients and
AdamW state take 16 bytes per parameter, plus activations.
"""

import dataclasses

from gptoss_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig

config = TrainConfig(
    model=dataclasses.replace(
        ModelConfig(),
        num_hidden_layers=24,
        num_local_experts=32,
        router_aux_loss_coef=0.001,
        remat="block",
    ),
    data=DataConfig(tokenizer="o200k_harmony", seq_len=4096, batch_size=256),
    optim=OptimConfig(learning_rate=1e-5, warmup_steps=100),
    mesh=MeshConfig(data=1, fsdp=-1),
    steps=1000,
    run_dir="runs/gpt-oss-20b",
)
