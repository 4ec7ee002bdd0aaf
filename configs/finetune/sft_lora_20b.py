"""LoRA on gpt-oss-20b with bfloat16 weights: adapters on attention and on every expert.

Learning rate, schedule, alpha and the rank in attention follow OpenAI's gpt-oss cookbook. That gives the full
rank to the experts of three layers; here all experts have adapters, of rank 2. We have not compared results.

Set `--data.source chat:GLOB`. On a single device, add `--optim.grad-accum-steps 16`.
"""

from gptoss_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

config = TrainConfig(
    model=ModelConfig(lora=LoraConfig(rank=8, alpha=16.0), remat="block"),
    data=DataConfig(source="chat:data/*.jsonl", tokenizer="o200k_harmony", seq_len=4096, batch_size=16),
    optim=OptimConfig(learning_rate=2e-4, warmup_steps=10, weight_decay=0.0),
    mesh=MeshConfig(data=1, fsdp=-1),
    # An evaluation also saves a checkpoint.
    checkpoint=CheckpointConfig(every=50),
    eval=EvalConfig(every=50),
    steps=300,
    init_from="hf:openai/gpt-oss-20b",
    run_dir="runs/sft-lora-20b",
)
