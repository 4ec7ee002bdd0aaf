"""Runs the cases of `check_cases.py`: compares kernels with their plain XLA equivalents."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from gptoss_jax.config.base import one_line
from gptoss_jax.kernels.attention.api import fits_triton
from gptoss_jax.kernels.check_cases import HEAD_SIZE, Arrays, Case, cases
from gptoss_jax.kernels.cpu import build

__all__ = ["Case", "Result", "cases", "check_case"]

# Maximum difference from the plain float32 result, relative to its largest value. Correct kernels are off by
# up to 5e-6 and 5e-3 (bfloat16 rounds at 4e-3); a float32 matmul in TF32 by 3e-4 or more.
TOLERANCE = {"float32": 5e-5, "bfloat16": 1.5e-2}
REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of a case. `detail` explains any status except "ok". "unchecked", as when out of memory, says
    nothing about the kernel."""

    kernel: str
    variant: str
    dtype: str
    status: Literal["ok", "wrong", "failed", "unavailable", "unchecked"]
    detail: str = ""
    error: float | None = None
    tolerance: float | None = None
    milliseconds: float | None = None
    plain_milliseconds: float | None = None


def check_case(case: Case, backend: str, interpret: bool = False) -> Result:
    """Runs a kernel and its plain XLA equivalent on the default device, and compares the results."""
    result = functools.partial(Result, case.kernel, case.variant, case.dtype)
    if backend == "cpu" and not build.is_available():
        return result("unavailable", "no working C++ compiler")
    if (case.kernel, backend, interpret) == ("attention", "gpu", False) and not fits_triton(HEAD_SIZE):
        return result("unavailable", "too little shared memory")
    try:
        arrays = case.arrays()
        wide = tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays)
        expected, _ = _timed(case.plain, wide, case.num_differentiable)
        _, plain_ms = _timed(case.plain, arrays, case.num_differentiable)
    except Exception as error:  # of any class: compilers and drivers have their own
        return result("unchecked", f"plain XLA failed: {_message(error)}")
    tolerance = TOLERANCE[case.dtype]
    result = functools.partial(result, tolerance=tolerance, plain_milliseconds=plain_ms)
    try:
        found, ms = _timed(case.run, arrays, case.num_differentiable)
    except Exception as error:
        # Running out of memory says nothing about the kernel.
        return result("unchecked" if "RESOURCE_EXHAUSTED" in str(error) else "failed", _message(error))
    largest = max(map(_difference, found, expected))
    if largest <= tolerance:
        return result("ok", error=largest, milliseconds=ms)
    detail = f"error {largest:.1e} exceeds {tolerance:.1e}"
    return result("wrong", detail, error=largest, milliseconds=ms)


def _message(error: Exception) -> str:
    return one_line(error)[:200]  # compiler errors can run to thousands of characters


def _timed(function: Callable, arrays: Arrays, num_differentiable: int) -> tuple[list[jax.Array], float]:
    """Returns the result and its gradients, and the median time of a call in milliseconds."""

    def with_gradients(arrays):
        first, rest = arrays[:num_differentiable], arrays[num_differentiable:]
        y, vjp = jax.vjp(lambda *first: function(*first, *rest), *first)
        # Exact in every dtype.
        cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).astype(jnp.bfloat16).astype(y.dtype)
        return [y, *vjp(cotangent.reshape(y.shape))]

    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(with_gradients)
        results, times = jax.block_until_ready(compiled(arrays)), []
        for _ in range(REPEATS):
            began = time.perf_counter()
            jax.block_until_ready(compiled(arrays))
            times.append(time.perf_counter() - began)
    return results, 1000 * statistics.median(times)


def _difference(found: jax.Array, expected: jax.Array) -> float:
    """Returns the maximum difference relative to the largest expected value; inf if a value is not finite."""
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    if found.shape != expected.shape:
        return math.inf
    difference = float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))
    return difference if math.isfinite(difference) else math.inf
