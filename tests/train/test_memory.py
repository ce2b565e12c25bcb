"""Memory of the process, as glibc's malloc really keeps it: elsewhere there is nothing to test."""

import ctypes
import re
from pathlib import Path

import pytest

from train import _memory

LIBC = _memory._glibc()
pytestmark = pytest.mark.skipif(LIBC is None, reason="the C library is not glibc")


def test_free_memory_is_given_back():
    assert LIBC is not None
    LIBC.malloc.restype, LIBC.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    LIBC.free.argtypes = [ctypes.c_void_p]
    before = resident_mb()
    blocks = [LIBC.malloc(2048) for _ in range(50_000)]
    for block in blocks:
        ctypes.memset(block, 1, 2048)
    last = LIBC.malloc(2048)  # malloc alone gives back what lies above the last block in use
    for block in blocks:
        LIBC.free(block)
    assert resident_mb() - before > 80.0
    _memory.give_back()
    assert resident_mb() - before < 40.0
    LIBC.free(last)


def resident_mb() -> float:
    """Memory that this process has at present, in MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6
