"""The story of `lowbit lora`: check, load the checkpoint, train a low-rank part beside it, keep the best, write it.

The same command after a kill goes on after the last step that was saved, to the same curve.
"""

import json
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lowbit_core.durable import write_text
from lowbit_core.errors import ConfigError, OutputError
from lowbit_core.log import get_logger
from lowbit_evaluate.loaded_model import LoadedModel, check_loadable, load_model, quantization_of
from lowbit_quantize.model.reference import ModelReference, find_model
from lowbit_quantize.model.skeleton import text_config
from lowbit_quantize.quality.dataset import load_texts
from lowbit_quantize.recipe import Text
from lowbit_recover.lora_examples import Example, load_examples
from lowbit_recover.lora_model import merged, peft_of, targets_of, write_adapter, write_model
from lowbit_recover.lora_output import RECORD, begun, check_disk, digest, writing
from lowbit_recover.lora_state import BEST, STATE, State
from lowbit_recover.lora_training import Data, Settings, Training

log = get_logger("recover")


@dataclass(frozen=True)
class Task:
    """A checkpoint, what it is trained on, and where the adapter goes; with `base` it is trained towards that."""

    checkpoint: str
    data: str
    out: Path
    heldout: str | None = None
    base: str | None = None
    device: str = "auto"
    overwrite: bool = False
    settings: Settings = field(default_factory=Settings)


def train_adapter(task: Task) -> dict[str, Any]:
    """Train an adapter and write it; returns its record. Raises LowbitError."""
    peft_of()
    reference, base = find_model(task.checkpoint), find_model(task.base) if task.base else None
    architecture = check_loadable(reference)
    targets = targets_of(architecture, task.settings.targets)
    data = _data(task, reference)
    identity = _identity(task, reference, base, targets, data)
    state = begun(task.out, identity, overwrite=task.overwrite)
    if state is None and (task.out / RECORD).is_file() and not task.overwrite:
        log.info("%s already holds this very adapter; nothing to do", task.out)
        return dict(json.loads((task.out / RECORD).read_text(encoding="utf-8")))
    device = _device(task.device)
    model, teacher = load_model(reference, device, fp8_cache=False), _teacher(base, reference, device)
    training = Training(task.settings, task.out, model, teacher, targets, data)
    check_disk(task.out, training.numbers)
    task.out.mkdir(parents=True, exist_ok=True)
    state = training.run(identity, state)
    record = _record(task, identity, state, training, data)
    with writing(task.out) as scratch:
        write_adapter(task.out, training.adapted, state.tensors[BEST], Path(reference.name).name, scratch)
        write_text(task.out / RECORD, json.dumps(record, indent=1) + "\n", scratch)
    (task.out / STATE).unlink(missing_ok=True)
    return record


def merge_adapter(checkpoint: str, adapter: Path, out: Path) -> None:
    """Write a 16-bit model with an adapter merged into it; raises LowbitError."""
    reference = find_model(checkpoint)
    if method := quantization_of(reference).get("quant_method"):
        raise ConfigError(
            f"--merge: {checkpoint} is quantized ({method}), and what an adapter adds is lost in its codes; "
            "merge into the 16-bit model that it was made of, and quantize that, or serve the adapter beside it: "
            "lowbit serve --lora-modules NAME=DIR"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"--out {out} holds something; give a new directory")
    whole = merged(load_model(reference, torch.device("cpu")).model, adapter)
    out.mkdir(parents=True, exist_ok=True)
    with writing(out) as scratch:
        write_model(whole, out, scratch)
        reference.tokenizer().save_pretrained(out)


def _data(task: Task, reference: ModelReference) -> Data:
    settings, tokenizer = task.settings, reference.tokenizer()
    if task.base is None:
        longest = settings.max_seq_length
        return Data(*load_examples(task.data, task.heldout, tokenizer, longest, settings.seed))
    held = max(2, settings.num_samples // 8)
    options: dict[str, Any] = {"max_seq_length": settings.max_seq_length, "seed": settings.seed}
    ours = Text(dataset=task.data, num_samples=settings.num_samples, **options)
    theirs = Text(dataset=task.heldout or task.data, num_samples=held, **options)
    texts = load_texts(ours, theirs, tokenizer, text_config(reference.config).vocab_size)
    whole = (True,) * settings.max_seq_length
    found = [[Example(tuple(row), whole) for row in text.ids.tolist()] for text in texts]
    return Data(found[0], found[1])


def _teacher(base: ModelReference | None, ours: ModelReference, device: torch.device) -> LoadedModel | None:
    if base is None:
        return None
    words = [text_config(one.config).vocab_size for one in (base, ours)]
    if words[0] != words[1]:
        raise ConfigError(
            f"--base {base.name} has {words[0]} words and {ours.name} {words[1]}; give the model that it was made of"
        )
    return load_model(base, device)


def _identity(
    task: Task, reference: ModelReference, base: ModelReference | None, targets: Sequence[str], data: Data
) -> dict[str, Any]:
    """All that decides the curve, as JSON has it."""
    digests = {name: digest(some) for name, some in (("training", data.training), ("heldout", data.heldout))}
    models = {"checkpoint": reference.sha256, "base": base.sha256 if base else None}
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    found = {
        "settings": asdict(task.settings) | {"targets": list(targets)},
        "data": digests,
        "versions": libraries,
        **models,
    }
    return dict(json.loads(json.dumps(found)))


def _device(asked: str) -> torch.device:
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise ConfigError("--device cuda: torch sees no CUDA device here; allowed: auto, cpu")
    return torch.device("cuda" if asked != "cpu" and available else "cpu")


def _record(
    task: Task, identity: Mapping[str, Any], state: State, training: Training, data: Data
) -> dict[str, Any]:
    """What `lora.json` says; paths are left out but for the last part of a name."""
    heldout = state.curve.heldout
    best = min(heldout, key=lambda step: heldout[step])
    return {
        "identity": dict(identity),
        "objective": training.objective.name,
        "checkpoint": Path(task.checkpoint).name,
        "base": Path(task.base).name if task.base else None,
        "trained_numbers": training.numbers,
        "examples": {
            "training": len(data.training),
            "heldout": len(data.heldout),
            "tokens_that_count": data.tokens,
        },
        "steps": state.step,
        "kept_after_step": best,
        "heldout_before": heldout[0],
        "heldout_after": heldout[best],
        "seconds": round(state.seconds, 1),
        "cpu_seconds": round(state.cpu_seconds, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "curve": {
            "training": state.curve.training,
            "heldout": {str(step): loss for step, loss in heldout.items()},
        },
    }
