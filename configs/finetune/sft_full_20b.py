"""Full supervised fine-tuning of gpt-oss-20b: all parameters, on many devices.

Parameters, gradients and AdamW state take 16 bytes per parameter, plus activations. Set
`--data.source chat:GLOB`.
"""

import dataclasses
import pathlib
import runpy

lora = runpy.run_path(str(pathlib.Path(__file__).parent / "sft_lora_20b.py"))["config"]
config = dataclasses.replace(
    lora,
    model=dataclasses.replace(lora.model, lora=None),
    optim=dataclasses.replace(lora.optim, learning_rate=2e-5),
    # Checkpoints hold all weights and the optimizer state.
    checkpoint=dataclasses.replace(lora.checkpoint, every=100),
    eval=dataclasses.replace(lora.eval, every=100),
    run_dir="runs/sft-full-20b",
)
