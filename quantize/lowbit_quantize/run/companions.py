"""What lies beside a base's weights: copied into the checkpoint, or left out because it is useless there."""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lowbit_core.manifest import MANIFEST_NAME, PROGRESS_NAME
from lowbit_quantize.model.weights import INDEX_NAME

CONFIG = "config.json"
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz",
    ".index.json", ".nemo", ".mlmodel", ".tflite",
)  # fmt: skip
TRAINING = (
    "trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth",
    "events.out.tfevents.*", "all_results.json", "train_results.json", "eval_results.json", "zero_to_fp32.py", "latest",
)  # fmt: skip
OTHER_FORMATS = ("original", "onnx", "openvino", "gguf", "coreml", "flax", "tf", "exl2", "mlx", "metal")
HIDDEN = "."
OF_WEIGHTS, OF_TRAINING, OF_FORMAT = (
    "weights in another form",
    "state of a training",
    "the model in another format",
)
CARD = "README.md"
OF_CARD = "the base's own card; the checkpoint's has its licence and languages"
OF_CODE, TOO_LARGE = "code of a class that transformers has itself", "larger than 128 MiB"
LARGE_BYTES = 128 << 20
SENTENCE_MODULES = "modules.json"  # of sentence-transformers: its folders hold small weights of their own


@dataclass(frozen=True)
class Companions:
    """Files beside a base's weights, by their paths in its directory; `left_out` with the reason."""

    copied: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def companions(base: Path, read: Collection[str]) -> Companions:
    """Tell apart what lies beside the weight files that are `read`; hidden files, and folders of runs, do not count."""
    found = Companions()
    code = _has_own_code(base)
    modules = _sentence_modules(base)
    for path in _files(base):
        name = path.relative_to(base).as_posix()
        if name in (CONFIG, INDEX_NAME) or name in read:
            continue
        reason = _useless(path, name, modules)
        if reason is None and path.suffix == ".py" and not code:
            reason = OF_CODE
        if reason is None and path.stat().st_size > LARGE_BYTES:
            reason = TOO_LARGE
        if reason is None:
            found.copied.append(name)
        elif reason:
            found.left_out[name] = reason
    return found


def copy_companions(base: Path, names: list[str], out: Path) -> None:
    """Copy them, links as what they point to."""
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, out / name)


def _files(base: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(base):
        folders[:] = sorted(
            one for one in folders if not one.startswith(HIDDEN) and not _is_run(Path(folder) / one)
        )
        for name in sorted(names):
            path = Path(folder) / name
            if not name.startswith(HIDDEN) and path.is_file():
                yield path


def _is_run(folder: Path) -> bool:
    """A checkpoint of ours, or an unfinished run: perhaps the one that is being written."""
    return any((folder / name).exists() for name in (MANIFEST_NAME, PROGRESS_NAME))


def _useless(path: Path, name: str, modules: tuple[str, ...]) -> str | None:
    """Why a file is left out; "" where it is what a run of ours writes anew."""
    top = name.partition("/")[0]
    if name in (MANIFEST_NAME, PROGRESS_NAME):
        return ""
    if name == CARD:
        return OF_CARD
    if "/" in name and top.lower() in OTHER_FORMATS:
        return OF_FORMAT
    if any(path.match(pattern) for pattern in TRAINING):
        return OF_TRAINING
    if "/" in name and top in modules:
        return None
    return OF_WEIGHTS if path.name.lower().endswith(WEIGHTS) else None


def _has_own_code(base: Path) -> bool:
    """Whether a file beside the configuration names code of the base's own (`auto_map`)."""
    for path in base.glob("*.json"):
        if path.name != CONFIG:
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, OSError):
                continue
            if isinstance(data, dict) and data.get("auto_map"):
                return True
    return False


def _sentence_modules(base: Path) -> tuple[str, ...]:
    try:
        data = json.loads((base / SENTENCE_MODULES).read_text(encoding="utf-8"))
        return tuple(str(one["path"]) for one in data if one.get("path"))
    except (ValueError, OSError, TypeError, KeyError, AttributeError):
        return ()
