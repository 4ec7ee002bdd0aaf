"""Teaches the model of `quickstart_sft.py` to prefer right answers to wrong ones: minutes on two CPU cores.

Pairs are the answer to a question about Python's standard library and the answer to another question. Only a
LoRA adapter is trained; the model without it is the reference.
"""

import dataclasses
import pathlib
import runpy

from gptoss_jax.config import LoraConfig

sft = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart_sft.py")))["config"]
config = dataclasses.replace(
    sft,
    objective="dpo",
    model=dataclasses.replace(sft.model, lora=LoraConfig(rank=8)),
    data=dataclasses.replace(
        sft.data, source="stdlib-preferences", tokenizer="file:runs/quickstart-sft/tokenizer.json"
    ),
    optim=dataclasses.replace(sft.optim, name="adamw", learning_rate=1e-3, warmup_steps=20),
    steps=300,
    init_from="runs/quickstart-sft",
    run_dir="runs/quickstart-dpo",
)
