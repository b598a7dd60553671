"""AdamW's two moments in memory-mapped files: the system writes them out where memory is short."""

import os
from pathlib import Path

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
FLOAT_BYTES = 4


def put_on_disk(optimizer: torch.optim.AdamW, folder: Path) -> None:
    """Move the moments of every parameter, all on the CPU and float32, into files in `folder`.

    Those that there are keep their numbers. Space is taken first: OSError where the disk has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    count = sum(one.numel() for one in parameters)
    for kind in MOMENTS:
        path = folder / f"{kind}.bin"
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, count * FLOAT_BYTES)
        numbers = torch.from_file(str(path), shared=True, size=count, dtype=torch.float32)
        parts = numbers.split([one.numel() for one in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            state = optimizer.state[parameter]
            moment = part.view_as(parameter)
            if kind in state:
                moment.copy_(state[kind])
            state.setdefault("step", torch.tensor(0.0))
            state[kind] = moment
