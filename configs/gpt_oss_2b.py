"""gpt-oss's architecture with 2.06B parameters (446M active), to train from random weights on 16 TPU chips.

20,000 steps of 128 x 4,096 tokens are 10.5B tokens: 24 for each active parameter, about one pass over the
dataset. The step was compiled for a TPU v5p-32 (`gptoss plan`), but nobody has trained this model: learning
rate and router losses are common for models of this size, and not tuned.

Needs `pip install -e '.[tpu,hf]'` for the dataset. Documents have at most 4,096 tokens, so YaRN is off.
"""

from gptoss_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

config = TrainConfig(
    model=ModelConfig(
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=2,
        num_local_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=4096,
        rope_scaling=None,
        router_aux_loss_coef=0.01,
        router_z_loss_coef=1e-3,
        remat="block",
    ),
    data=DataConfig(
        source="hf:HuggingFaceFW/fineweb-edu:sample-10BT",
        tokenizer="o200k_harmony",
        seq_len=4096,
        batch_size=128,
    ),
    optim=OptimConfig(learning_rate=4e-4, warmup_steps=1000),
    mesh=MeshConfig(data=1, fsdp=-1),
    checkpoint=CheckpointConfig(every=1000),
    eval=EvalConfig(every=1000),
    steps=20_000,
    run_dir="runs/gpt-oss-2b",
)
