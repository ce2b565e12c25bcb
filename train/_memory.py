"""Memory of the process, which glibc's malloc keeps larger than it need be.

XLA's CPU kernels take their scratch space from malloc at every step of a loop. Where several
devices run at once, the heaps that malloc makes for their threads fragment, a little more with
every update, until the program ends; and what compiling needed, some 250 MB, it does not hand back.
Measured in `benchmarks/LOG.md`. With another C library nothing is done.
"""

import ctypes
import os

M_ARENA_MAX = -8  # malloc.h


def use_one_heap() -> None:
    """Let all threads share malloc's one heap; before anything is computed.

    Left alone where the user has set MALLOC_ARENA_MAX.
    """
    libc = _glibc()
    if libc is not None and "MALLOC_ARENA_MAX" not in os.environ:
        libc.mallopt(M_ARENA_MAX, 1)


def give_back() -> None:
    """Hand free memory back to the system: after compiling."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it has glibc's settings of malloc."""
    if os.name != "posix":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
