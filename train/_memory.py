"""Memory of the process, which glibc's malloc keeps larger than it need be."""

import ctypes
import os


def give_back() -> None:
    """Hand free memory back to the system: after compiling, which leaves some 250 MB of it.

    With another C library than glibc nothing is done.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it has glibc's way to give memory back."""
    if os.name != "posix":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None
