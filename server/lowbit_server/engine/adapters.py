"""LoRA adapters: those named at the start, and those of one directory, each loaded when a request names it.

An adapter is a directory with `adapter_config.json` and `adapter_model.safetensors`: no pickle is read, and no name
leads out of the directory.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowbit_core.errors import ConfigError
from lowbit_server.config import ServeConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapters:
    """The adapters that can be served: `modules` by name, and each in `directory` by its folder's name."""

    modules: tuple[tuple[str, Path], ...] = ()
    directory: Path | None = None

    def path_of(self, name: str) -> Path | None:
        """The directory of an adapter; None where none has this name."""
        given = dict(self.modules).get(name)
        if given is not None or self.directory is None or NAME.fullmatch(name) is None:
            return given
        path = (self.directory / name).resolve()
        inside = path.is_relative_to(self.directory.resolve())
        return path if inside and all((path / file).is_file() for file in (CONFIG, WEIGHTS)) else None


def open_adapters(config: ServeConfig, taken: Sequence[str]) -> Adapters:
    """The adapters that the flags name, checked; raises ConfigError for one that cannot be served.

    A name that a flag gives may hold slashes, as the model's may; one of a folder may not. `taken`: the model's names.
    """
    names = [name for name, _ in config.lora_modules]
    for name, path in config.lora_modules:
        sound = all(NAME.fullmatch(part) for part in name.split("/"))
        if not sound or name in taken or names.count(name) > 1:
            raise ConfigError(f"--lora-modules {name}={path}: the name is taken or holds other than letters, "
                              "digits, '.', '_', '-' and slashes between them")  # fmt: skip
        _check(name, path, config.max_lora_rank)
    if config.lora_dir is not None and not config.lora_dir.is_dir():
        raise ConfigError(f"--lora-dir {config.lora_dir} is not a directory")
    return Adapters(config.lora_modules, config.lora_dir)


def _check(name: str, path: Path, most: int) -> None:
    try:
        found = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind, rank = found["peft_type"], int(found["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--lora-modules {name}: {path / CONFIG} is not an adapter's: {error!r}") from None
    if kind != "LORA" or not (path / WEIGHTS).is_file():
        raise ConfigError(f"--lora-modules {name}: {path} needs peft_type LORA (it has {kind}) and {WEIGHTS}")
    if rank > most:
        raise ConfigError(f"--lora-modules {name} has rank {rank}; raise --max-lora-rank above {most}")
