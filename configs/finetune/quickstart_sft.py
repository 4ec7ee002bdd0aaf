"""Fine-tunes the model of `configs/quickstart.py` to answer questions: minutes on two CPU cores.

Questions and answers are generated from the docstrings and signatures of Python's standard library.
Afterwards, `gptoss chat runs/quickstart-sft` answers in Harmony's format.
"""

import dataclasses
import pathlib
import runpy

quickstart = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "quickstart.py"))["config"]
config = dataclasses.replace(
    quickstart,
    model=dataclasses.replace(quickstart.model, router_aux_loss_coef=0.0, router_z_loss_coef=0.0),
    data=dataclasses.replace(
        quickstart.data, source="stdlib-chat", tokenizer="file:runs/quickstart/tokenizer.json"
    ),
    optim=dataclasses.replace(quickstart.optim, learning_rate=3e-3, warmup_steps=20),
    checkpoint=dataclasses.replace(quickstart.checkpoint, every=50),
    eval=dataclasses.replace(quickstart.eval, every=100, batches=8, sample_tokens=80, temperature=0.0),
    steps=500,
    init_from="runs/quickstart",
    run_dir="runs/quickstart-sft",
)
