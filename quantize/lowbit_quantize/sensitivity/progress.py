"""How far a walk back has come, in a file beside its result: a killed run goes on from its last finished layer.

The walk forward is made again, which is a small part; to the same numbers, because nothing of it is random.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit_core.durable import move

GRADIENT, GENERATOR, IDENTITY, NEXT, CACHED = "gradient", "generator", "identity", "next", "cached"
Scores = dict[str, dict[str, Tensor]]  # by decision and candidate: nats of each token, (sequences, tokens)


@dataclass
class State:
    """What the layers that are done have left; `next_layer` is the one that is scored next, −1 after the last.

    `cached` has how many numbers of one token each decision on a cache is about.
    """

    next_layer: int
    gradient: Tensor
    generator: Tensor
    scores: Scores = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)


class Progress:
    """The file; it counts only for a run of the same `identity`."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity

    def load(self) -> State | None:
        """What an earlier process left, if it was to do the same."""
        if not self._path.exists():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get(IDENTITY) != self._identity:
                    return None
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError):
            return None
        state = State(
            int(about[NEXT]), found.pop(GRADIENT), found.pop(GENERATOR), {}, json.loads(about[CACHED])
        )
        for name, tensor in found.items():
            decision, candidate = json.loads(name)
            state.scores.setdefault(decision, {})[candidate] = tensor
        return state

    def save(self, state: State) -> None:
        """Write the file anew; it is whole or not there."""
        tensors = {
            json.dumps([decision, candidate]): tensor.contiguous()
            for decision, by in state.scores.items()
            for candidate, tensor in by.items()
        }
        tensors |= {GRADIENT: state.gradient.cpu(), GENERATOR: state.generator}
        about = {IDENTITY: self._identity, NEXT: str(state.next_layer), CACHED: json.dumps(state.cached)}
        beside = self._path.with_name(f"{self._path.name}.part")
        save_file(tensors, beside, metadata=about)
        move(beside, self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
