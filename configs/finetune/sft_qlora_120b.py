"""QLoRA on gpt-oss-120b: the experts stay packed in MXFP4, as published, and only adapters are trained.

For four devices, each with one row of 4,096 tokens at a time and a quarter of the experts. On a single device
of 80 GB or more, add `--optim.grad-accum-steps 8`. Set `--data.source chat:GLOB`.
"""

import dataclasses
import pathlib
import runpy

small = runpy.run_path(str(pathlib.Path(__file__).parent / "sft_qlora_20b.py"))["config"]
config = dataclasses.replace(
    small,
    model=dataclasses.replace(small.model, num_hidden_layers=36, num_local_experts=128),
    optim=dataclasses.replace(small.optim, grad_accum_steps=2),
    mesh=dataclasses.replace(small.mesh, fsdp=1, expert=-1),
    init_from="hf:openai/gpt-oss-120b",
    run_dir="runs/sft-qlora-120b",
)
