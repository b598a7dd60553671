"""What a killed training goes on from: one file with everything that decides the next step.

The order of the data is drawn anew from the seed and the epoch, so that no state of a generator is kept.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit_core.durable import disk_errors, move
from lowbit_core.errors import OutputError

STATE = "lora-state.safetensors"
SCRATCH = f".{STATE}"  # while it is written
KEY = "lowbit"  # of the metadata
NOW, MEAN, SQUARE, BEST = "now", "exp_avg", "exp_avg_sq", "best"


@dataclass
class Curve:
    """Training loss by step, and held-out loss by the steps before it."""

    training: list[float] = field(default_factory=list)
    heldout: dict[int, float] = field(default_factory=dict)

    @property
    def best(self) -> float:
        return min(self.heldout.values(), default=float("inf"))


@dataclass
class State:
    """After `step` steps: the tensors that are trained, Adam's, the best so far, and the time that it took."""

    identity: Mapping[str, Any]
    step: int
    curve: Curve
    tensors: dict[str, dict[str, Tensor]]
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def save(directory: Path, state: State) -> None:
    """Replace the file in one move; raises OutputError where the disk cannot take it."""
    flat = {
        f"{part}/{name}": value.detach().contiguous().clone()
        for part, some in state.tensors.items()
        for name, value in some.items()
    }
    words = {
        "identity": dict(state.identity),
        "step": state.step,
        "curve": asdict(state.curve),
        "seconds": state.seconds,
        "cpu_seconds": state.cpu_seconds,
    }
    scratch = directory / SCRATCH
    try:
        with disk_errors():
            save_file(flat, scratch, metadata={KEY: json.dumps(words)})
        move(scratch, directory / STATE)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OutputError(
            f"--out {directory}: {error.strerror or error}; make room and run the same command again: it goes on after "
            "the last step that was saved"
        ) from error


def load(directory: Path) -> State | None:
    """What `save` wrote; None where nothing is. Raises OutputError of a file that is none of ours."""
    path = directory / STATE
    if not path.is_file():
        return None
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            words = json.loads(file.metadata()[KEY])
            for key in file.keys():  # noqa: SIM118 (not a dict)
                part, _, name = key.partition("/")
                tensors.setdefault(part, {})[name] = file.get_tensor(key)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({error}); give --overwrite to begin anew") from None
    curve = words["curve"]
    heldout = {int(step): loss for step, loss in curve["heldout"].items()}
    took = words["seconds"], words["cpu_seconds"]
    return State(words["identity"], words["step"], Curve(curve["training"], heldout), tensors, *took)


def adam_state(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Adam's means by the names of what it moves; empty before the first step."""
    return {
        part: {name: optimizer.state[one][part] for name, one in names.items() if one in optimizer.state}
        for part in (MEAN, SQUARE)
    }


def restore_adam(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], state: State) -> None:
    """The inverse of `adam_state`, after `state.step` steps."""
    for name, one in names.items() if state.step else ():
        optimizer.state[one] = {
            "step": torch.tensor(float(state.step)),
            **{part: state.tensors[part][name].to(one.device) for part in (MEAN, SQUARE)},
        }
