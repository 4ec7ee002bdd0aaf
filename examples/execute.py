"""Executes notebooks and stores their outputs: python examples/execute.py [NOTEBOOK …]

The default is those that are stored with outputs, main.ipynb and serve.ipynb. They run one after the other in
one temporary folder, because serve.ipynb serves what main.ipynb has trained.
"""

import hashlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent
EXECUTED = ("main.ipynb", "serve.ipynb")


def execute(
    path: str | os.PathLike, folder: str | os.PathLike, replacements: Mapping[str, str] | None = None
) -> nbformat.NotebookNode:
    """Returns a notebook with the outputs of all cells, executed in a folder by a new kernel of this Python.

    `replacements` maps code of the notebook to code that runs in its place: tests need smaller sizes. Raises
    ValueError if the notebook does not have the code exactly once, and nbclient's CellExecutionError for a
    cell that fails.
    """
    notebook = nbformat.read(path, as_version=4)
    for old, new in (replacements or {}).items():
        cells = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
        if len(cells) != 1 or cells[0].source.count(old) != 1:
            raise ValueError(f"{path}: {old!r} must be in it exactly once")
        cells[0].source = cells[0].source.replace(old, new)
    resources = {"metadata": {"path": os.fspath(folder)}}
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources=resources,
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    # The versions that executed it are in its first output.
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.executed_sources = sources_digest(notebook)
    return notebook


def sources_digest(notebook: nbformat.NotebookNode) -> str:
    """Returns a hash of the sources of the code cells: outputs stored with another one are out of date."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def main() -> None:
    paths = [pathlib.Path(name) for name in sys.argv[1:]] or [FOLDER / name for name in EXECUTED]
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            print(f"executing {path} …", flush=True)
            nbformat.write(execute(path, folder), path)


if __name__ == "__main__":
    main()
