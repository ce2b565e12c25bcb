"""Memory of the process, as glibc's malloc really keeps it: elsewhere there is nothing to test."""

import subprocess
import sys

import pytest

from train import _memory

pytestmark = pytest.mark.skipif(_memory._glibc() is None, reason="the C library is not glibc")

# in a process of its own: in an older one malloc takes the blocks from memory that it has already
FREE_AND_GIVE_BACK = """
import ctypes, re
from pathlib import Path
from train import _memory

def resident_mb():
    found = re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6

libc = _memory._glibc()
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
before = resident_mb()
blocks = [libc.malloc(2048) for _ in range(50_000)]
for block in blocks:
    ctypes.memset(block, 1, 2048)
last = libc.malloc(2048)  # malloc alone gives back what lies above the last block in use
for block in blocks:
    libc.free(block)
print(resident_mb() - before)
_memory.give_back()
print(resident_mb() - before)
"""


def test_free_memory_is_given_back():
    argv = [sys.executable, "-c", FREE_AND_GIVE_BACK]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    freed, given_back = map(float, done.stdout.split())
    assert freed > 80.0
    assert given_back < 40.0
