"""Memory of the process, as glibc's malloc really keeps it: elsewhere there is nothing to test."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from train import _memory

LIBC = _memory._glibc()
pytestmark = pytest.mark.skipif(LIBC is None, reason="the C library is not glibc")

# prints whether a thread's block lies in the heap of the process, where the first thread's do
OF_A_THREAD = """
import ctypes, re, threading
from pathlib import Path
from train import _memory
_memory.use_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
found = []
thread = threading.Thread(target=lambda: found.append(libc.malloc(1000)))
thread.start()
thread.join()
heap = re.search(r"^([0-9a-f]+)-([0-9a-f]+) .*heap", Path("/proc/self/maps").read_text(), re.M)
print(int(heap[1], 16) <= found[0] < int(heap[2], 16))
"""


@pytest.mark.parametrize(("given", "shared"), [({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)])
def test_threads_share_one_heap_unless_the_user_says(given, shared):
    env = {k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"} | given
    out = subprocess.run(
        [sys.executable, "-c", OF_A_THREAD], env=env, check=True, capture_output=True, text=True
    ).stdout
    assert out.strip() == str(shared)


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
