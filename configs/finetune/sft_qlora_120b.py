"""QLoRA on gpt-oss-120b: the experts stay packed in MXFP4, as published, and only adapters are trained."""

import dataclasses
import pathlib
import runpy

small = runpy.run_path(str(pathlib.Path(__file__).parent / "sft_qlora_20b.py"))["config"]
config = dataclasses.replace(
    small,
    model=dataclasses.replace(small.model, num_hidden_layers=36, num_local_experts=128),
    optim=dataclasses.replace(small.optim, grad_accum_steps=2),
    mesh=dataclasses.replace(small.mesh, data=1, fsdp=-1),
    init_from="hf:openai/gpt-oss-120b",
    run_dir="runs/sft-qlora-120b",
)
