"""Where a base model comes from: a local directory, a GGUF file, or the hub at a revision.

Whatever it was, the walk sees one thing: a directory of safetensors that is read tensor by tensor.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

from lowbit_core.errors import ModelError
from lowbit_core.manifest import file_sha256

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class ModelReference:
    """A model that was found, not yet read: `path` is a directory or a GGUF file."""

    name: str
    kind: Literal["directory", "gguf", "hub"]
    path: Path
    revision: str | None = None

    @cached_property
    def config(self) -> Any:
        """The transformers configuration; raises ModelError where there is none or it is of an unknown type."""
        try:
            if self.kind == "gguf":
                return AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
            return AutoConfig.from_pretrained(self.path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{self.name}: {_model_type(self) or 'no readable configuration'}: {error}"
            ) from error

    @property
    def model_type(self) -> str:
        """The architecture's name, read without building a configuration when the file says it."""
        return _model_type(self) or str(self.config.model_type)

    def sha256(self) -> dict[str, str]:
        """Hash of the configuration and of every weight file."""
        if self.kind == "gguf":
            return {self.path.name: file_sha256(self.path)}
        names = ["config.json", *sorted({file.name for file in self.path.glob("*.safetensors")})]
        return {name: file_sha256(self.path / name) for name in names}


def find_model(name: str) -> ModelReference:
    """Resolve `--model`; raises ModelError when nothing is there."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _directory(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model file {name} does not exist; give a .gguf file, a directory or a hub id")
        return ModelReference(name=path.stem, kind="gguf", path=path.resolve())
    if path.exists() or not HUB_ID.fullmatch(name) or name.startswith((".", "/")):
        raise ModelError(f"model {name!r} is not a directory, a .gguf file or a hub id OWNER/NAME[@REVISION]")
    return _from_hub(name)


def _directory(path: Path) -> ModelReference:
    if not (path / "config.json").is_file():
        raise ModelError(f"model directory {path} has no config.json; give a Hugging Face model directory")
    if not (path / INDEX_NAME).is_file() and not (path / SINGLE_NAME).is_file():
        raise ModelError(f"model directory {path} has no safetensors weights ({SINGLE_NAME} or {INDEX_NAME})")
    return ModelReference(name=path.resolve().name, kind="directory", path=path.resolve())


def _from_hub(name: str) -> ModelReference:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        path = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model {name!r} is no local path and could not be had from the hub: {reason}"
        ) from error
    found = _directory(Path(path))
    return ModelReference(name=repository, kind="hub", path=found.path, revision=found.path.name)


def _model_type(reference: ModelReference) -> str | None:
    if reference.kind == "gguf":
        from gguf import GGUFReader

        try:
            field = GGUFReader(reference.path).get_field("general.architecture")
        except (ValueError, OSError, IndexError) as error:
            raise ModelError(f"{reference.path} is not a readable GGUF file: {error}") from error
        return str(field.contents()) if field else None
    try:
        data = json.loads((reference.path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{reference.path / 'config.json'} is not readable JSON: {error}") from error
    return str(data["model_type"]) if "model_type" in data else None


def unpack_gguf(reference: ModelReference, directory: Path) -> Path:
    """Dequantize a GGUF file into a bfloat16 safetensors directory with its tokenizer."""
    disable_progress_bar()  # ours is enough
    folder, file = reference.path.parent, reference.path.name
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=file, dequantize=True),
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(directory)
    return directory


class WeightFiles:
    """The safetensors of a directory, read one tensor at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = directory / INDEX_NAME
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            with safe_open(directory / SINGLE_NAME, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE_NAME)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as stored; raises ModelError when it is missing."""
        if name not in self._file_of:
            raise ModelError(f"{self.directory} lacks the tensor {name}; the model is incomplete")
        with self._open(name) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def bytes(self) -> int:
        """Size of the weight files."""
        return sum((self.directory / file).stat().st_size for file in set(self._file_of.values()))

    def _open(self, name: str) -> Any:
        return safe_open(self.directory / self._file_of[name], framework="pt")
