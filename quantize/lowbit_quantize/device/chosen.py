"""Which device a command runs on."""

import torch

from lowbit_core.errors import ConfigError


def chosen_device(name: str) -> torch.device:
    """The device of `--device`: auto, cpu or cuda; raises ConfigError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here; allowed: auto, cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
