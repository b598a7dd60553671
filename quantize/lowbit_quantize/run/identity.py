"""What makes two runs the same run, and in which words two of them differ."""

import platform
from collections.abc import Collection, Iterator
from importlib.metadata import version
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from lowbit_core import __version__
from lowbit_core.manifest import Manifest, TextRecord
from lowbit_quantize.recipe import Recipe

LIBRARIES = ("torch", "transformers", "compressed-tensors", "safetensors")
# Raised by a change after which some run has other numbers (benchmarks/same_bytes.py shows that).
WALK_VERSION = 4


class Identity(BaseModel):
    """All that decides a run's bytes; `threads` may reorder sums, which moves last bits and nothing else.

    `texts` are hashes of token ids, `base` those of the base model's files, `walk_version` is what our own code made
    of them: layers of two versions are not of one run, though the release is the same. A finished checkpoint is the
    same whatever tools and device made it: these are empty then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any]
    base: dict[str, str]
    texts: dict[str, str | None]
    versions: dict[str, str] = {}
    walk_version: int = 0
    device: str = ""
    threads: int = 0

    def differences(self, now: "Identity", unread: Collection[str] = ()) -> list[str]:
        """What `now` does otherwise, a few words each; files of the base model that are `unread` may change."""
        found = [f"recipe ({change})" for change in _changes(_flat(self.recipe), _flat(now.recipe))]
        changed = [name for name, _ in _pairs(self.base, now.base) if name not in unread]
        found += [f"model ({name})" for name in changed]
        texts = [name for name, _ in _pairs(self.texts, now.texts)]
        # What is set aside is of the calibration text, and changes with it.
        found += [f"{name} text" for name in texts if name != "set-aside" or "calibration" not in texts]
        if self.versions and now.versions:
            found += [f"version ({change})" for change in _changes(self.versions, now.versions)]
        if self.device and now.device:
            found += [f"device ({self.device}, now {now.device})"] if self.device != now.device else []
        return found


def identity_of(
    recipe: Recipe, base: dict[str, str], texts: dict[str, str | None], device: torch.device
) -> Identity:
    """The identity of a run that is about to begin; `base` and `texts` are hashes."""
    return Identity(
        recipe=deciding(recipe),
        base=base,
        texts=texts,
        versions=tool_versions(),
        walk_version=WALK_VERSION,
        device=device.type,
        threads=torch.get_num_threads(),
    )


def identity_in(manifest: Manifest) -> Identity:
    """The identity of a finished run."""
    return Identity(
        recipe=_complete(manifest.recipe),
        base=manifest.base.sha256,
        texts=texts_of(manifest.calibration, manifest.quality.heldout),
    )


def texts_of(calibration: TextRecord | None, heldout: TextRecord) -> dict[str, str | None]:
    """The hashes of all texts, by what they are called in words."""
    return {
        "calibration": calibration.sha256 if calibration else None,
        "set-aside": calibration.set_aside_sha256 if calibration else None,
        "held-out": heldout.sha256,
    }


def deciding(recipe: Recipe) -> dict[str, Any]:
    """A recipe without what decides no byte: words about it, and where texts lie, whose hashes count instead."""
    data = recipe.model_dump(mode="json", exclude={"description"})
    for section in ("calibration", "quality"):
        for key in ("dataset", "token_ids"):
            del data[section][key]
    return data


def _complete(recipe: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe with the defaults of keys that are newer than it."""
    try:
        return deciding(Recipe.model_validate(recipe))
    except ValidationError:
        return recipe


def tool_versions() -> dict[str, str]:
    """Versions of everything whose arithmetic or files a run depends on."""
    libraries = {name: version(name) for name in LIBRARIES}
    return {"lowbit": __version__, "python": platform.python_version(), **libraries}


def _flat(data: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in data.items():
        items = dict(enumerate(value)) if isinstance(value, list) else value
        flat.update(_flat(items, f"{prefix}{key}.") if isinstance(items, dict) else {f"{prefix}{key}": value})
    return flat


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [f"{name} {old}, now {new}" for name, (old, new) in _pairs(before, now)]


def _pairs(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """What differs: the name, and both values; None where one has none."""
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) != now.get(name):
            yield name, (before.get(name), now.get(name))
