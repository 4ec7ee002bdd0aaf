"""C++ kernels for CPU, compiled on first use with the system's compiler."""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import warnings

import jax
import jax.numpy as jnp
import jaxlib

from gptoss_jax.config.paths import cache_folder
from gptoss_jax.interrupts import cleanup
from gptoss_jax.kernels import backend, selection

HERE = pathlib.Path(__file__).parent
SOURCES = tuple(str(path) for path in sorted(HERE.glob("*.cc")))
# Without errno, compilers vectorize square roots.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
HANDLERS = (
    "AdamW",
    "GlobalNorm",
    "GroupedMatmul",
    "GroupedMatmulWeightGrad",
    "GroupedMatmulMxfp4",
    "DecodeMatmul",
    "DecodeMatmulTransposed",
    "DecodeExperts",
    "DecodeExpertsMxfp4",
    "DecodeAttention",
    "SwiGLU",
    "SwiGLUGrad",
    "Rope",
    "Attention",
    "AttentionGrad",
)


def is_usable(kernel: str, *dtypes: jnp.dtype) -> bool:
    """Returns True if a kernel of this folder can be used for operands of these dtypes: float32 or bfloat16
    on CPU, enabled (`selection.is_enabled`), and compiled."""
    fits = backend.platform() == "cpu" and all(dtype in (jnp.float32, jnp.bfloat16) for dtype in dtypes)
    return fits and selection.is_enabled(kernel) and is_available()


@functools.cache
def is_available() -> bool:
    """Compiles the kernels, once per machine, and registers them with XLA. Returns False if there is no
    working C++ compiler, with a warning if one is installed but fails."""
    library = load_library()
    if library is None:
        return False
    for name in HANDLERS:
        jax.ffi.register_ffi_target(target(name), jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def load_library() -> ctypes.CDLL | None:
    """Returns the compiled kernels; None, with `is_available`'s warning, if they cannot be compiled."""
    compilers = filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
    failure = None
    for compiler in dict.fromkeys(compilers):
        try:
            return ctypes.CDLL(str(_compile(compiler)))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            lines = (output.decode(errors="replace") if isinstance(output, bytes) else output).splitlines()
            line = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
            failure = (
                f"{compiler} cannot compile the kernels in kernels/cpu/, or they cannot be loaded; falling "
                f"back to plain XLA: {line}"
            )
    if failure:
        warnings.warn(failure, stacklevel=3)
    return None


def target(name: str) -> str:
    """Returns the name of an FFI target in XLA."""
    return f"gptoss_jax.{name}"


def _compile(compiler: str) -> pathlib.Path:
    """Returns the library for the current sources, compiler, jaxlib and CPU, cached if possible."""
    files = sorted(path for path in HERE.iterdir() if path.suffix in (".cc", ".h"))
    settings = " ".join((compiler, *FLAGS, jaxlib.__version__, _processor())).encode()
    key = hashlib.sha256(b"".join((*(path.read_bytes() for path in files), settings))).hexdigest()[:16]
    library = cache_folder("native") / f"kernels-{key}.so"
    if library.exists():
        return library
    # Several processes may compile at once: each writes a separate file, and the last to finish wins.
    with cleanup(), tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = pathlib.Path(folder) / library.name
        command = [compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), *SOURCES, "-o", str(output)]
        subprocess.run(
            command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=300
        )
        os.replace(output, library)
    return library


def _processor() -> str:
    """Returns the CPU features that -march=native depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
