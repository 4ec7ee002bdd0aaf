"""DPO on gpt-oss-20b: adapters learn from pairs of answers; the experts stay packed in MXFP4.

The reference is the model without the adapter. Beta is TRL's default, and the learning rate ten times theirs
for full training, as usual for adapters. We have not compared results. Set `--data.source preferences:GLOB`.
"""

import dataclasses
import pathlib
import runpy

qlora = runpy.run_path(str(pathlib.Path(__file__).parent / "sft_qlora_20b.py"))["config"]
config = dataclasses.replace(
    qlora,
    objective="dpo",
    data=dataclasses.replace(qlora.data, source="preferences:data/*.jsonl"),
    optim=dataclasses.replace(qlora.optim, learning_rate=1e-5),
    run_dir="runs/dpo-qlora-20b",
)
