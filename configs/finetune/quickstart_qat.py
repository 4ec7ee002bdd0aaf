"""Trains the model of `configs/quickstart.py` for MXFP4 experts: minutes on two CPU cores.

The forward pass computes with the weights that `gptoss convert runs/quickstart-qat FOLDER` writes, at 4.25
bits per expert weight.
"""

import dataclasses
import pathlib
import runpy

quickstart = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "quickstart.py"))["config"]
config = dataclasses.replace(
    quickstart,
    model=dataclasses.replace(quickstart.model, expert_fake_quant=True),
    data=dataclasses.replace(quickstart.data, tokenizer="file:runs/quickstart/tokenizer.json"),
    optim=dataclasses.replace(quickstart.optim, learning_rate=1e-3, warmup_steps=10),
    eval=dataclasses.replace(quickstart.eval, every=100),
    steps=200,
    init_from="runs/quickstart",
    run_dir="runs/quickstart-qat",
)
