"""Memory that a process has freed and the C library still holds.

glibc raises its threshold for blocks of their own as large tensors are freed (up to 32 MiB), and keeps what it frees in
a heap with holes. Between two phases with different sizes of tensors that costs hundreds of MB of peak memory.
"""

import ctypes
import sys

M_MMAP_THRESHOLD = -3
OWN_BLOCK_BYTES = 4 << 20


def return_freed_memory() -> None:
    """Give freed memory back to the system, and from now on each large block as soon as it is freed (glibc only)."""
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    for name, arguments in (("mallopt", (M_MMAP_THRESHOLD, OWN_BLOCK_BYTES)), ("malloc_trim", (0,))):
        function = getattr(library, name, None)
        if function is not None:
            function(*arguments)
