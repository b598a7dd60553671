"""Documents of a data set on the hub: `hub:NAME[:CONFIG][:SPLIT][@REVISION]`, read as a stream."""

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lowbit_core.errors import RecipeError
from lowbit_core.names import did_you_mean
from lowbit_core.text_file import quote
from lowbit_quantize.quality.document import Document
from lowbit_quantize.quality.forms import FormError, as_document

PREFIX = "hub:"
SPLIT = "train"  # where a data set has it
MOST_NAMES = 12  # of configurations that an error lists


@dataclass(frozen=True)
class HubSource:
    """What is written after `hub:`, taken apart."""

    name: str
    parts: tuple[str, ...]
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> "HubSource":
        rest, _, revision = text.removeprefix(PREFIX).partition("@")
        name, *parts = rest.split(":")
        if not name or len(parts) > 2 or "//" in text:
            raise RecipeError(f"text source {text!r}: write hub:NAME[:CONFIG][:SPLIT][@REVISION]")
        return cls(name, tuple(part for part in parts if part), revision or None)


def read_hub(text: str, characters: int, library: Any = None) -> Iterator[Document]:
    """Documents of a split, as many as give `characters`; `library` is the package datasets."""
    source = HubSource.parse(text)
    datasets = library or _datasets(text)
    try:
        config, split = _choose(source, datasets)
        rows = datasets.load_dataset(
            source.name, config, split=split, revision=source.revision, streaming=True
        )
        for number, row in enumerate(rows, 1):
            document = _document(row, f"{text}, row {number}")
            characters -= len(document.words)
            yield document
            if characters < 0:
                return
    except RecipeError:
        raise
    except Exception as error:  # whatever datasets, its readers and the network raise
        raise RecipeError(
            f"text source {text} cannot be read: {type(error).__name__}: {quote(str(error))}; "
            "see that the name is right, public or logged in to, and the hub within reach"
        ) from error


def _datasets(text: str) -> Any:
    os.environ.setdefault("HF_DATASETS_TRUST_REMOTE_CODE", "0")  # older versions ask on the terminal
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise RecipeError(
            f"text source {text} needs the package datasets; run `pip install datasets`"
        ) from None


def _choose(source: HubSource, datasets: Any) -> tuple[str | None, str]:
    """Configuration and split; one part alone is either, and a split where it could be both."""
    configs = list(datasets.get_dataset_config_names(source.name, revision=source.revision))
    parts = list(source.parts)
    named = parts[0] if parts and parts[0] in configs else None
    config = named or _default(source, configs, datasets)
    if parts and named is None and (len(parts) == 2 or config is None):
        raise RecipeError(_unknown(source, "configuration", parts[0], configs))
    if config is None and len(configs) > 1:
        shown = ", ".join(configs[:MOST_NAMES]) + (", …" if len(configs) > MOST_NAMES else "")
        raise RecipeError(
            f"{PREFIX}{source.name} has the configurations {shown}; write hub:{source.name}:{configs[0]}"
        )
    splits = list(datasets.get_dataset_split_names(source.name, config, revision=source.revision))
    wanted = next((part for part in parts[::-1] if part in splits), None)
    left = [part for part in parts if part not in (named, wanted)]
    if left:
        raise RecipeError(_unknown(source, "split", left[0], splits))
    split = wanted or (SPLIT if SPLIT in splits else splits[0] if len(splits) == 1 else None)
    if split is None:
        example = ":".join([source.name, *([named] if named else []), splits[0]])
        raise RecipeError(f"{PREFIX}{source.name} has the splits {', '.join(splits)}; write hub:{example}")
    return config, split


def _default(source: HubSource, configs: list[str], datasets: Any) -> str | None:
    if len(configs) == 1:
        return configs[0]
    name: str | None = datasets.get_dataset_default_config_name(source.name, revision=source.revision)
    return name


def _unknown(source: HubSource, what: str, given: str, names: list[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")
    hint = did_you_mean(given, names)
    return f"{PREFIX}{source.name} has no {what} {given!r}; {hint}it has {shown}; write hub:NAME[:CONFIG][:SPLIT]"


def _document(row: Any, place: str) -> Document:
    try:
        return as_document(row, place)
    except FormError as error:
        raise RecipeError(f"text {place}: {error}") from None
