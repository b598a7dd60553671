"""A model directory as Hugging Face publishes it: its configuration and tokenizer, by transformers' Auto classes.

Code of a model's own is run nowhere but for a tokenizer, and there only when that was asked for; no question is asked.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig

from lowbit_core.errors import ModelError
from lowbit_core.log import get_logger
from lowbit_core.manifest_files import file_sha256
from lowbit_quantize.model.sources.contents import CONFIG
from lowbit_quantize.model.weights import WeightFiles

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")
REASON_LENGTH = 300

log = get_logger("quantize")


@dataclass(frozen=True)
class ModelDirectory:
    """`name` is what messages call it."""

    name: str
    path: Path
    trust_remote_code: bool

    @cached_property
    def config(self) -> Any:
        """The transformers configuration; raises ModelError where there is none or it is of an unknown type."""
        said = self.written_config
        if "auto_map" in said and said.get("model_type") not in CONFIG_MAPPING:
            raise ModelError(
                f"{self.name} is code of its own (auto_map in {CONFIG}) for the model type {said.get('model_type')!r}, "
                "which is not run; models that transformers itself has are read"
            )
        _check_dtype(self.name, said)
        self._check_generation()
        try:
            config = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a wrong file makes of transformers' code
            raise unreadable("configuration", self.name, error) from error
        if _has_no_head(said, config):
            log.info(
                "%s has no head: its quality is measured through its embedding in place of one", self.name
            )
            config.get_text_config(decoder=True).tie_word_embeddings = True
        return config

    def _check_generation(self) -> None:
        """A file that transformers cannot read keeps the model itself from being opened; raises ModelError."""
        if not (self.path / GENERATION).is_file():
            return
        try:
            GenerationConfig.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # as below
            reason = " ".join(str(error).split())[:REASON_LENGTH]
            raise ModelError(
                f"{GENERATION} of {self.name} cannot be read ({type(error).__name__}: {reason}), so that no engine "
                "opens the model; set it right or remove it"
            ) from error

    @property
    def written_config(self) -> dict[str, Any]:
        """`config.json` as it was written."""
        return read_json(self.path / CONFIG)

    @property
    def model_type(self) -> str:
        """The architecture's name, read without building a configuration when the file says it."""
        said = self.written_config
        return str(said["model_type"]) if "model_type" in said else str(self.config.model_type)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Hash of the configuration and of every weight file."""
        return {name: hash_of(self.path / name) for name in (CONFIG, *WeightFiles(self.path).files)}

    def tokenizer(self) -> Any:
        """The tokenizer; raises ModelError where there is none, or it is code that may not be run."""
        code = self._tokenizer_code()
        if code and not self.trust_remote_code:
            raise ModelError(
                f"the tokenizer of {self.name} is code of its own ({code}), which is not run; "
                "read that code, and give --trust-remote-code if it may be"
            )
        if not code and not any(file for pattern in VOCABULARIES for file in self.path.glob(pattern)):
            raise ModelError(
                f"{self.name} has no tokenizer ({', '.join(VOCABULARIES)}); copy its files from the original model"
            )
        try:
            return AutoTokenizer.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=code is not None
            )
        except Exception as error:  # as above
            raise unreadable("tokenizer", self.name, error) from error

    def _tokenizer_code(self) -> str | None:
        """The class of the tokenizer, where it is in a file of the model and not in transformers."""
        path = self.path / TOKENIZER_CONFIG
        said = read_json(path) if path.is_file() else {}
        own, name = said.get("auto_map"), str(said.get("tokenizer_class") or "")
        classes = own.get("AutoTokenizer") if isinstance(own, Mapping) else own
        named = [one for one in (classes if isinstance(classes, list) else [classes]) if one]
        known = (name, f"{name}Fast", name.removesuffix("Fast"))
        if not named or any(one and hasattr(transformers, one) for one in known):
            return None
        return str(named[-1])


def _has_no_head(said: Mapping[str, Any], config: Any) -> bool:
    """Whether a model was saved without its head, as those that embed are: by the class of its layers alone."""
    layers = MODEL_MAPPING.get(type(config), None)
    names = (
        [one.__name__ for one in layers] if isinstance(layers, tuple) else [getattr(layers, "__name__", "")]
    )
    classes = said.get("architectures")
    return isinstance(classes, list) and bool(classes) and all(one in names for one in classes)


def _check_dtype(name: str, said: Mapping[str, Any]) -> None:
    """Raises ModelError on a type that is none, such as `auto`, for which transformers has no words."""
    for key in ("dtype", "torch_dtype"):
        given = said.get(key)
        known = getattr(torch, given, None) if isinstance(given, str) else None
        if given is not None and not isinstance(known, torch.dtype):
            raise ModelError(
                f"{CONFIG} of {name} has {key} {given!r}, which is no type of PyTorch's, so that no engine opens the "
                "model; set it to bfloat16, or to what its weights are stored in"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ModelError where the file is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} is not a JSON object; fetch it again")
    return data


def hash_of(path: Path) -> str:
    """A file's SHA-256; raises ModelError where it cannot be read."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; fetch it again") from error


def unreadable(what: str, name: str, error: Exception) -> ModelError:
    """A library's failure as one line."""
    reason = " ".join(str(error).split())[:REASON_LENGTH]
    return ModelError(
        f"the {what} of {name} cannot be read: {type(error).__name__}: {reason}; fetch it again"
    )
