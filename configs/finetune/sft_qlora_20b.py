"""QLoRA on gpt-oss-20b: the experts stay packed in MXFP4, as published, and only adapters are trained.

For one device, with one row of 4,096 tokens at a time. Set `--data.source chat:GLOB`; `gptoss plan` shows
what fits on other devices.
"""

import dataclasses
import pathlib
import runpy

lora = runpy.run_path(str(pathlib.Path(__file__).parent / "sft_lora_20b.py"))["config"]
config = dataclasses.replace(
    lora,
    model=dataclasses.replace(lora.model, expert_format="mxfp4"),
    data=dataclasses.replace(lora.data, batch_size=8),
    optim=dataclasses.replace(lora.optim, grad_accum_steps=8),
    mesh=dataclasses.replace(lora.mesh, fsdp=1),
    run_dir="runs/sft-qlora-20b",
)
