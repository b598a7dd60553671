"""Memory that a process does not need: what it has freed and the C library still holds, and a compiler.

glibc raises its threshold for blocks of their own as large tensors are freed (up to 32 MiB), and keeps what it frees in
a heap with holes. Between two phases with different sizes of tensors that costs hundreds of MB of peak memory. Within
one phase, where the next layer wants what the last one freed, giving it back costs the system a tenth of all CPU time.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 128 << 20
LARGE_BLOCK_BYTES, OWN_BLOCK_BYTES = 32 << 20, 4 << 20  # the first is the most that glibc allows


def keep_freed_memory() -> None:
    """From now on, keep up to `KEPT_BYTES` of freed memory for the next tensors (glibc only)."""
    _call("mallopt", M_TRIM_THRESHOLD, KEPT_BYTES)
    _call("mallopt", M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def return_freed_memory() -> None:
    """Give back to the system what is freed now, holes and all (glibc only)."""
    _call("malloc_trim", 0)


def keep_no_freed_memory() -> None:
    """Give freed memory back, and from now on each large block as soon as it is freed (glibc only)."""
    _call("mallopt", M_MMAP_THRESHOLD, OWN_BLOCK_BYTES)
    return_freed_memory()


@contextmanager
def without_compiler() -> Iterator[None]:
    """While the block imports a library, `@torch.compile` there does nothing.

    At the first such decorator torch loads its whole compiler: 44 MB and 0.7 s of CPU time.
    """
    compiler = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def _call(name: str, *arguments: int) -> None:
    if sys.platform.startswith("linux"):
        function = getattr(ctypes.CDLL(None), name, None)
        if function is not None:
            function(*arguments)
