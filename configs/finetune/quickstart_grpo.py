"""Teaches the model of `quickstart_sft.py` to answer in five words: minutes on two CPU cores.

The reward of an answer is 1 if it has exactly five words. There are no right answers to imitate: the model
samples answers, and those with a reward become more likely. Only a LoRA adapter is trained, and kept near
the model without it.
"""

import dataclasses
import pathlib
import runpy

from gptoss_jax.config import GrpoConfig, LoraConfig


def five_words(prompt, answer, row):
    """1 for a complete answer of five words."""
    return float(answer.is_well_formed and len(answer.split()) == 5)


sft = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart_sft.py")))["config"]
config = dataclasses.replace(
    sft,
    objective="grpo",
    grpo=GrpoConfig(rewards=(f"{__file__}:five_words",), group_size=8, max_new_tokens=32, beta=0.03),
    model=dataclasses.replace(sft.model, lora=LoraConfig(rank=8)),
    data=dataclasses.replace(
        sft.data,
        source="stdlib-prompts",
        tokenizer="file:runs/quickstart-sft/tokenizer.json",
        seq_len=384,
        batch_size=64,
    ),
    optim=dataclasses.replace(
        sft.optim, name="adamw", learning_rate=5e-3, warmup_steps=5, schedule="wsd", decay_fraction=0.3
    ),
    eval=dataclasses.replace(sft.eval, every=30, batches=1, temperature=1.0),
    steps=150,
    init_from="runs/quickstart-sft",
    run_dir="runs/quickstart-grpo",
)
