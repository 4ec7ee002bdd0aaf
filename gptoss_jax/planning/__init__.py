"""What a training step costs on devices that need not be here.

`chips.py` holds published figures, `estimate.py` works the step out from shapes, `meshes.py` compares meshes,
`compiled.py` has the real TPU compiler work it out, `hlo.py` reads what that compiler wrote, and `table.py`
shows it all. `report.py` is the command.
"""
