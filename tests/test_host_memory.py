"""Freed memory of a process: kept for the next step, and released."""

import ctypes
import os
import subprocess
import sys

import pytest

from gptoss_jax import host_memory, startup

KEEP_AND_RELEASE = """
import ctypes
from gptoss_jax import host_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
before = host_memory.resident_bytes()
block, above = libc.malloc(200 << 20), libc.malloc(100)
ctypes.memset(block, 1, 200 << 20)
libc.free(block)
freed = host_memory.resident_bytes()
host_memory.release()
print(freed - before >> 20, host_memory.resident_bytes() - before >> 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_stays_until_it_is_released():
    environment = os.environ | {"GLIBC_TUNABLES": ":".join(startup.TUNABLES)}
    command = [sys.executable, "-c", KEEP_AND_RELEASE]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    freed, released = map(int, out.split())
    assert freed >= 190 and released <= 20, out


def test_growth_is_released(monkeypatch):
    # Released twice; the second time, 1,100 bytes are in use.
    sizes, released = iter([1000, 1040, 1060, 1000, 1040, 1200, 1100, 1150, 1160, 1000]), []
    monkeypatch.setattr(host_memory, "resident_bytes", lambda: next(sizes))
    growth, count = host_memory.Growth(), []
    monkeypatch.setattr(host_memory, "release", lambda: released.append(1))
    for _ in range(7):
        growth.check()
        count.append(len(released))
    assert count == [0, 0, 1, 1, 2, 2, 3]
