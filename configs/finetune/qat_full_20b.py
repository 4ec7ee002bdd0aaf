"""Quantization-aware training of gpt-oss-20b: all parameters, for experts that are MXFP4 again afterwards.

Start from a fine-tuned model: `--init-from RUN`. `gptoss convert` then writes the weights that the run
computed with. Recipe and learning rate follow NVIDIA's for gpt-oss (Model Optimizer). We have not compared
results. Set `--data.source chat:GLOB`.
"""

import dataclasses
import pathlib
import runpy

full = runpy.run_path(str(pathlib.Path(__file__).parent / "sft_full_20b.py"))["config"]
config = dataclasses.replace(
    full,
    model=dataclasses.replace(full.model, expert_fake_quant=True),
    optim=dataclasses.replace(full.optim, learning_rate=1e-5),
    run_dir="runs/qat-full-20b",
)
