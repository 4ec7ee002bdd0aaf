"""GRPO on gpt-oss-20b: adapters learn from rewards of sampled answers; the experts stay packed in MXFP4.

Each step samples 8 answers to each of 8 prompts. The settings of the loss are TRL's defaults, and the
learning rate is the one that unsloth uses for adapters on gpt-oss. We have not compared results. Set
`--data.source prompts:GLOB` and `--grpo.rewards`.
"""

import dataclasses
import pathlib
import runpy

from gptoss_jax.config import GrpoConfig

qlora = runpy.run_path(str(pathlib.Path(__file__).parent / "sft_qlora_20b.py"))["config"]
config = dataclasses.replace(
    qlora,
    objective="grpo",
    grpo=GrpoConfig(rewards=("exact",), group_size=8, max_new_tokens=1024),
    data=dataclasses.replace(qlora.data, source="prompts:data/*.jsonl", seq_len=2048, batch_size=64),
    optim=dataclasses.replace(qlora.optim, learning_rate=5e-5, schedule="constant", grad_accum_steps=16),
    eval=dataclasses.replace(qlora.eval, every=25, batches=1, temperature=1.0),
    checkpoint=dataclasses.replace(qlora.checkpoint, every=25),
    run_dir="runs/grpo-qlora-20b",
)
