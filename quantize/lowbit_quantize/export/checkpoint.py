"""A finished checkpoint, read back: its manifest, its configuration, and its linears as codes and parameters."""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lowbit_core.errors import CheckpointError
from lowbit_core.manifest import MANIFEST_NAME, Manifest, ModuleRecord, read_manifest
from lowbit_core.manifest_files import verify_files
from lowbit_quantize.catalog import Catalog
from lowbit_quantize.model.weights import INDEX_NAME
from lowbit_quantize.schemes.dense import NAMES as DENSE
from lowbit_quantize.schemes.scheme import Quantized, Scheme


class Checkpoint:
    """A directory that `lowbit quantize` wrote; raises CheckpointError where it is not whole."""

    def __init__(self, directory: Path, catalog: Catalog) -> None:
        self.directory = directory
        manifest = read_manifest(directory)
        if manifest is None:
            raise CheckpointError(
                f"{directory} has no {MANIFEST_NAME}; give a checkpoint that `lowbit quantize` wrote"
            )
        if manifest.export is not None:
            raise CheckpointError(
                f"{directory} was exported to {manifest.export.to}; give the checkpoint that it was made of"
            )
        verify_files(directory, manifest, hashes=False)
        self.manifest: Manifest = manifest
        self._presets = {preset.name: preset for preset in catalog.presets}
        self.modules: Mapping[str, ModuleRecord] = {
            module.name: module for module in manifest.modules if module.scheme not in DENSE.values()
        }

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`."""
        data: dict[str, Any] = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        return data

    @property
    def stretches(self) -> set[str]:
        """How positions are stretched, of any layer: transformers' names of it; empty where they are not."""
        config = self.config.get("text_config") or self.config  # of a wrapper
        said = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kinds = said.values() if all(isinstance(one, dict) for one in said.values()) else [said]
        return {str(one.get("rope_type") or one.get("type") or "default") for one in kinds} - {"default"}

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each quantized linear."""
        return {name: self._scheme(module) for name, module in self.modules.items()}

    @property
    def shards(self) -> list[str]:
        """Names of the weight files."""
        return sorted(
            name for name in self.manifest.files if name.endswith(".safetensors") and "/" not in name
        )

    @property
    def other_files(self) -> list[str]:
        """Names of the files that are neither weights, nor the index, nor the configuration."""
        return [name for name in self.manifest.files if name not in (*self.shards, INDEX_NAME, "config.json")]

    @cached_property
    def tensors(self) -> dict[str, str]:
        """Which shard each linear, by its name, and each other tensor is in."""
        found: dict[str, str] = {}
        for shard in self.shards:
            with safe_open(self.directory / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    module, _, part = name.rpartition(".")
                    found[module if module in self.modules and part != "bias" else name] = shard
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a linear's weight, or of another tensor."""
        with safe_open(self.directory / self.tensors[name], framework="pt") as file:
            if name not in self.modules:
                return tuple(file.get_slice(name).get_shape())
            if f"{name}.weight_shape" in file.keys():  # noqa: SIM118
                return tuple(file.get_tensor(f"{name}.weight_shape").tolist())
            return tuple(file.get_slice(f"{name}.weight").get_shape())

    def linear(self, name: str) -> Quantized:
        """One linear as it was quantized."""
        with safe_open(self.directory / self.tensors[name], framework="pt") as file:
            names = list(file.keys())
            parts = [key for key in names if key.rpartition(".")[0] == name and not key.endswith(".bias")]
            return self.schemes[name].read({key.rpartition(".")[2]: file.get_tensor(key) for key in parts})

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor that is not quantized."""
        with safe_open(self.directory / self.tensors[name], framework="pt") as file:
            found: Tensor = file.get_slice(name)[start:stop]
            return found

    def read(self, shard: str) -> Iterator[tuple[str, Quantized | Tensor]]:
        """Every tensor of a shard that is no linear's, and linears as they were quantized, by name, one at a time."""
        here = [name for name, place in self.tensors.items() if place == shard]
        for name in here:
            if name not in self.modules:
                yield name, self._tensor(shard, name)
        for name in here:
            if name in self.modules:
                yield name, self.linear(name)

    def _tensor(self, shard: str, name: str) -> Tensor:
        """A file that is open keeps what was read of it in memory: each tensor opens it anew."""
        with safe_open(self.directory / shard, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found

    def _scheme(self, module: ModuleRecord) -> Scheme:
        if module.scheme not in self._presets:
            raise CheckpointError(
                f"{self.directory}: {module.name} is stored as {module.scheme}, which this Lowbit does not know; "
                "install a newer one"
            )
        return self._presets[module.scheme].make(module.group_size or "channel")
