"""The device that is checked: waiting for it, timing on it, its peak memory."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """A device, and whether everything is small on it."""

    device: torch.device
    tiny: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.cuda else "cpu"

    def wait(self) -> None:
        """Until all that was launched is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def median_ms(self, function: Callable[[], Any], repeats: int = 5) -> float:
        """Median milliseconds of a call, after one that is not counted."""
        function()
        taken = []
        for _ in range(1 if self.tiny else repeats):
            self.wait()
            start_s = time.perf_counter()
            function()
            self.wait()
            taken.append((time.perf_counter() - start_s) * 1e3)
        return round(median(taken), 3)

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float]:
        """Peak GB of the GPU since `forget_peak`, and of the process since it began."""
        process_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        found = {"process_peak_gb": round(process_gb, 2)}
        if self.cuda:
            found["gpu_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return found


class Spent:
    """Seconds by cause. A cause that begins while another runs takes its time from it, so that all add up."""

    def __init__(self, place: Place) -> None:
        self._place, self._running = place, [""]
        self._since_s = 0.0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, cause: str) -> Iterator[None]:
        """Count what the block takes, the device's work included, as `cause`."""
        self._turn_to()
        self._running.append(cause)
        try:
            yield
        finally:
            self._turn_to()
            self._running.pop()

    def _turn_to(self) -> None:
        self._place.wait()
        now_s = time.perf_counter()
        if cause := self._running[-1]:
            self.seconds[cause] = self.seconds.get(cause, 0.0) + now_s - self._since_s
        self._since_s = now_s
