"""Run many small tensor computations on all cores: one thread each, rather than all threads on each in turn.

The pieces of a search fit a core's cache, and splitting one such piece over threads costs more than it gains
(on 2 cores, 1.7 times the CPU seconds for no less time). On a GPU there is one stream and nothing to split.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Item], Result], items: Sequence[Item], device: torch.device
) -> list[Result]:
    """`[function(item) for item in items]`, in this order, on all of torch's threads when on the CPU."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(items) < 2:
        return [function(item) for item in items]
    torch.set_num_threads(1)  # the products' library counts threads for the process, OpenMP for each thread
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch's CPU operations use one thread while the block runs.

    For decompositions: on two threads those of a thousand inputs take no less time, and beside other work a hundred
    times as much CPU time, spent on waiting for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
