"""A model repository for Triton's vLLM backend: the checkpoint itself, as it is, and what starts vLLM on it.

    OUT/NAME/config.pbtxt        names the backend; its inputs and outputs Triton completes by itself
    OUT/NAME/1/model.json        vLLM's engine arguments: those that follow from the checkpoint, and no others
    OUT/NAME/1/checkpoint/       the checkpoint, whole, with its manifest; Triton passes over folders that are no number

The backend gives `model.json` to vLLM as it stands, so a relative `model` is read from the working directory of
tritonserver, and nothing stands for the repository's own place. So `model` begins at the repository, for a server
that is started in it, or is absolute where `mount` says what the repository is called there. Source: vllm_backend of
January 2026, src/model.py and its sample. No Triton has run it: the layout is proven.
"""

import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from lowbit_core.errors import ConfigError
from lowbit_core.manifest import MANIFEST_NAME
from lowbit_core.manifest_files import verify_files
from lowbit_core.model_shape import shape_from_config
from lowbit_core.served_checkpoint import ServedCheckpoint
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import Exported
from lowbit_quantize.run.writer import write_json

VERSION, FOLDER = "1", "checkpoint"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# The devices are vLLM's to choose: KIND_GPU would pin the model to one.
CONFIG = """backend: "vllm"

instance_group [
  {
    count: 1
    kind: KIND_MODEL
  }
]
"""


class Triton:
    """The target `triton`; `mount` is the repository's absolute path where Triton runs."""

    name = "triton"
    readers = "Triton Inference Server with its vLLM backend"
    one_file = False

    def __init__(self, model_name: str | None = None, mount: str | None = None) -> None:
        if model_name is not None and not NAME.fullmatch(model_name):
            raise ConfigError(
                f"--model-name {model_name} names a folder and a part of a URL; letters, digits and . _ - are allowed"
            )
        if mount is not None and not PurePosixPath(mount).is_absolute():
            raise ConfigError(
                f"--mount {mount} is relative; give the absolute path of the repository where Triton runs"
            )
        self._name, self._root = model_name, PurePosixPath(mount or ".")

    def supports(self, checkpoint: Checkpoint) -> str | None:
        name = _served(checkpoint).name
        if self._name is None and not NAME.fullmatch(name):
            return f"its name would be {name!r}, which is no part of a URL; give --model-name"
        return None

    def write(self, checkpoint: Checkpoint, out: Path) -> Exported:
        served = _served(checkpoint)
        name = self._name or served.name
        place = out / name / VERSION / FOLDER
        for file in (*checkpoint.manifest.files, MANIFEST_NAME):
            _carry(checkpoint.directory / file, place / file)
        verify_files(place, checkpoint.manifest, hashes=True)
        (out / name / "config.pbtxt").write_text(CONFIG, encoding="utf-8")
        model = self._root / name / VERSION / FOLDER
        write_json(place.parent / "model.json", engine_arguments(served, model))
        size = checkpoint.manifest.size
        packed = round(size.linear_bits_per_weight * size.quantized_parameters / 8)
        return Exported(size.bytes, packed, [], with_manifest=False)


def engine_arguments(served: ServedCheckpoint, model: PurePosixPath) -> dict[str, Any]:
    """`model.json`; a path that is relative begins with ./, so that it is never taken for a name on the hub."""
    method = served.quantization.get("quant_method")
    return {
        "model": str(model) if model.is_absolute() else f"./{model}",
        **({"quantization": method} if method else {}),
        **served.engine_arguments(),
    }


def _served(checkpoint: Checkpoint) -> ServedCheckpoint:
    config = checkpoint.config
    return ServedCheckpoint(checkpoint.directory, config, shape_from_config(config), checkpoint.manifest)


def _carry(source: Path, place: Path) -> None:
    """Weights become second names of the same files, where the disk is the same; what people edit is copied."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".safetensors":
        try:
            os.link(source.resolve(), place)
        except OSError:  # another disk, or a file of another user
            pass
        else:
            return
    shutil.copyfile(source, place)
