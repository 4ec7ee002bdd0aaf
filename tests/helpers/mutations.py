"""Random changes to request bodies."""

from typing import Any

import numpy as np

ODD: list[Any] = [
    None, True, -1, 0, 1, 1.5, 1e300, 10**30, "", "x", "\x00\u2028\ud7ff", "function", "object", "required",
    [], [[]], [None], ["x"], {}, {"type": 1}, {"type": "function"}, {"$ref": "#"}, [{"type": "text"}],
]  # fmt: skip


def mutated(value: Any, rng: np.random.Generator) -> Any:
    """Replaces, drops or repeats one random value inside another."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        copy = value.copy()
        key = rng.choice(list(copy)) if isinstance(copy, dict) else int(rng.integers(len(copy)))
        if rng.random() < 0.1:
            del copy[key]
        elif rng.random() < 0.1 and isinstance(copy, list):
            copy.insert(key, copy[key])
        else:
            copy[key] = mutated(copy[key], rng)
        return copy
    return ODD[rng.integers(len(ODD))]
