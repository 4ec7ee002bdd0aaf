"""Published data that is not part of the repository."""

import pathlib

import pytest

# Beside the checkout. Tests that need a file of it are skipped without it.
SHARED_DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"


def shared_data(name: str) -> pathlib.Path:
    """Returns the path of a file or folder in `shared/data`; skips the test if it is not there."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"needs ../shared/data/{name}, beside the checkout")
    return path
