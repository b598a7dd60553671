"""Where a base model comes from: a local directory, a GGUF file, or the hub at a revision.

Whatever it was, the walk sees one thing: a directory of safetensors that is read tensor by tensor.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoTokenizer

from lowbit_core.errors import ModelError
from lowbit_core.manifest import file_sha256
from lowbit_quantize.model.weights import INDEX_NAME, SINGLE_NAME, WeightFiles

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
        except Exception as error:  # whatever a wrong file makes of transformers' code
            raise ModelError(f"{self.name}: its configuration cannot be read: {error}") from error

    @property
    def model_type(self) -> str:
        """The architecture's name, read without building a configuration when the file says it."""
        return _model_type(self) or str(self.config.model_type)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Hash of the configuration and of every weight file, taken once."""
        if self.kind == "gguf":
            return {self.path.name: file_sha256(self.path)}
        names = ["config.json", *WeightFiles(self.path).files]
        return {name: self._hash(name) for name in names}

    def _hash(self, name: str) -> str:
        try:
            return file_sha256(self.path / name)
        except OSError as error:
            raise ModelError(
                f"{self.path / name} cannot be read: {error.strerror}; fetch it again"
            ) from error

    def tokenizer(self) -> Any:
        """The tokenizer; raises ModelError where there is none."""
        try:
            if self.kind == "gguf":
                return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # as above
            raise ModelError(f"{self.name} has no readable tokenizer: {error}") from error


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
    """Configuration and tokenizer; the weights come with `fetch_weights`, when everything else is known to fit."""
    repository, _, revision = name.partition("@")
    path = _download(repository, revision or None, ["*.json", "*.model", "*.jinja", "*.txt"])
    return ModelReference(name=repository, kind="hub", path=path, revision=path.name)


def fetch_weights(reference: ModelReference) -> None:
    """Download the weights of a hub model; nothing to do for the other kinds."""
    if reference.kind == "hub":
        _download(reference.name, reference.revision, ["model*.safetensors", INDEX_NAME])
        _directory(reference.path)


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model {repository!r} is no local path and could not be had from the hub: {reason}"
        ) from error


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
