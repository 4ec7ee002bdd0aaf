"""A small mixture of experts, trained on Python's standard library in minutes on two CPU cores.

Muon (Jordan et al. 2024) orthogonalizes the updates of the matrices; AdamW updates the rest.
"""

from gptoss_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

config = TrainConfig(
    model=ModelConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=128,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        rope_scaling=None,
        router_aux_loss_coef=0.01,
        router_z_loss_coef=1e-4,
        scan_layers=False,
    ),
    data=DataConfig(source="stdlib", tokenizer="bpe:4096", seq_len=512, batch_size=4),
    optim=OptimConfig(name="muon", learning_rate=1e-2, warmup_steps=40, min_lr_ratio=0.0),
    checkpoint=CheckpointConfig(every=100),
    eval=EvalConfig(every=200, batches=16, prompt="def ", sample_tokens=80),
    steps=800,
    run_dir="runs/quickstart",
)
