"""Ranks: processes that make one checkpoint together.

All of them walk the same walk and decide the same; what is dear is dealt, and every rank gets every result, in the
order in which one rank alone makes them. Nothing is summed over ranks: a sum's last bits depend on who adds what. So
the files are byte for byte those of one rank, however many there are. The first rank alone writes.

Processes are started by `lowbit quantize --ranks N` (run/launch.py) or torchrun, which tell each its number by
environment variables. Results travel by gloo, through the CPU's memory, on GPUs too.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from lowbit_core.errors import EngineError, LowbitError
from lowbit_quantize.device.parallel import parallel_map

Item = TypeVar("Item")
Result = TypeVar("Result")

_alone: list[bool] = []
APART = 1 << 16  # bytes of a tensor that is not copied to be sent
WAIT = timedelta(hours=24)  # for a rank that is still at work; one that has died is noticed at once


class RankLost(EngineError):
    """Another rank has ended."""


@dataclass(frozen=True)
class _Group:
    """The ranks of this run, this one's number among them and on its machine, and how they talk."""

    rank: int
    size: int
    local: int
    gloo: Any


_joined: list[_Group] = []  # one at most


@contextmanager
def joined() -> Iterator[None]:
    """With the other ranks while the block runs, where whoever started this process says that there are any.

    All leave together: who left before would look as if it had died. Threads that carry results end here, as one that
    gives back a tensor while Python ends would end the process with SIGABRT.
    """
    _join()
    try:
        yield
        for source in range(count()):
            if count() > 1:
                exchange(None, source, torch.device("cpu"))
    finally:
        _joined.clear()


def _join() -> None:
    """Meet the other ranks.

    The group is our own and not torch's default one, and what the environment says of it is taken out: libraries that
    load a model act upon both.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _joined:
        store, rank, size = next(iter(rendezvous("env://")))
        gloo = dist.ProcessGroupGloo(PrefixStore("lowbit", store), rank, size, WAIT)
        _joined.append(_Group(rank, size, int(os.environ.get("LOCAL_RANK", "0")), gloo))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)


def own_device(device: torch.device) -> torch.device:
    """The rank's own of several GPUs on a machine."""
    if device.type != "cuda" or not _joined:
        return device
    return torch.device("cuda", _joined[0].local % torch.cuda.device_count())


def count() -> int:
    """How many ranks share the work of this moment."""
    return _joined[0].size if _joined and not _alone else 1


def rank() -> int:
    """The number of this one, from 0."""
    return _joined[0].rank if _joined and not _alone else 0


@contextmanager
def alone() -> Iterator[None]:
    """What is done while the block runs was dealt to this rank: it is not shared once more."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def is_first() -> bool:
    """Whether this is the rank that writes."""
    return not _joined or _joined[0].rank == 0


def own(items: Sequence[Item]) -> Sequence[Item]:
    """Those of some items that are dealt to this rank: one of them each in turn."""
    return items[rank() :: count()]


def spread(function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """`[function(item) for item in items]` on all ranks, each of them on all of torch's threads when on the CPU."""
    return in_order(parallel_map(function, own(items), device), device)


def in_order(mine: Sequence[Result], device: torch.device) -> list[Result]:
    """What all ranks made of items that were dealt, in the order of the items."""
    if count() == 1:
        return list(mine)
    everyone = [exchange(list(mine), source, device) for source in range(count())]
    total = sum(map(len, everyone))
    return [everyone[number % count()][number // count()] for number in range(total)]


def wait_for_first() -> None:
    """Until the first rank comes here too."""
    if count() > 1:
        exchange(None, 0, torch.device("cpu"))


def exchange(mine: Any, source: int, device: torch.device) -> Any:
    """What the rank `source` calls `mine`, on all ranks; tensors come to `device`."""
    sends = rank() == source
    parts = _packed(mine) if sends else []
    try:
        sizes = _broadcast_sizes([len(part) for part in parts], source)
        if not sends:
            parts = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        for part in parts:
            _broadcast(part, source)
    except RuntimeError as error:
        raise RankLost(
            "another rank has ended; what was finished is kept: run the same command again, with any number of ranks"
        ) from error
    return mine if sends else _unpacked(parts, device)


def by_first(make: Callable[[], Result], device: torch.device | None = None) -> Result:
    """What the first rank makes, on all ranks; an error that it raises on purpose is raised by all."""
    if count() == 1:
        return make()
    outcome: tuple[Any, LowbitError | None] = (None, None)
    if is_first():
        try:
            with alone():
                outcome = make(), None
        except LowbitError as error:
            outcome = None, error
    value, refusal = exchange(outcome, 0, device or torch.device("cpu"))
    if refusal is not None:
        raise refusal
    made: Result = value
    return made


def _broadcast_sizes(sizes: Sequence[int], source: int) -> list[int]:
    count = torch.tensor([len(sizes)])
    _broadcast(count, source)
    told = torch.tensor(sizes) if sizes else torch.empty(int(count), dtype=torch.int64)
    _broadcast(told, source)
    found: list[int] = told.tolist()
    return found


def _broadcast(tensor: Tensor, source: int) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = source, 0
    _joined[0].gloo.broadcast([tensor], options).wait()


class _Pickler(pickle.Pickler):
    """A tensor is its bytes, type and shape: no more than what it shows of a larger one, and of no device."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (raw, value.dtype, tuple(value.shape))


def _tensor(raw: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(raw).view(dtype).view(shape).to(_arriving[-1])


_arriving = [torch.device("cpu")]  # where tensors that are being unpacked go


def _packed(value: Any) -> list[Tensor]:
    """Bytes of a value, and those of its large tensors where they lie."""
    apart: list[Tensor] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < APART:
            return True
        apart.append(torch.from_numpy(np.frombuffer(raw, dtype=np.uint8)))
        return False

    head = BytesIO()
    _Pickler(head, protocol=5, buffer_callback=stays).dump(value)
    return [torch.frombuffer(head.getbuffer(), dtype=torch.uint8), *apart]


def _unpacked(parts: Sequence[Tensor], device: torch.device) -> Any:
    head, *apart = (part.numpy().data for part in parts)
    _arriving.append(device)
    try:
        return pickle.loads(head, buffers=apart)  # from processes that we started
    finally:
        _arriving.pop()
