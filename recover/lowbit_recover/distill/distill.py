"""The story of a distillation: the base says what it thinks of a text, the checkpoint learns it and is measured anew.

The result is a checkpoint like the one that was given: the same files, in which what was trained is written over.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit_core.durable import move
from lowbit_core.log import get_logger
from lowbit_core.manifest import MANIFEST_NAME, Manifest, QualityRecord, StepRecord, write_manifest
from lowbit_core.manifest_files import file_record, record_files, verify_files
from lowbit_evaluate.heldout_text import run_text
from lowbit_evaluate.loaded_model import load_model
from lowbit_quantize.card import write_card
from lowbit_quantize.device import ranks
from lowbit_quantize.model.decoder import BATCH_TOKENS
from lowbit_quantize.model.reference import ModelReference, fetch_weights, find_model
from lowbit_quantize.model.skeleton import text_config
from lowbit_quantize.quality import kl
from lowbit_quantize.quality.dataset import TokenText, load_texts
from lowbit_quantize.recipe import parse_recipe
from lowbit_quantize.run.clock import Clock
from lowbit_quantize.run.directory import check_disk
from lowbit_quantize.run.identity import tool_versions
from lowbit_recover.distill.forecast import disk_bytes
from lowbit_recover.distill.measured import (
    Reference,
    base_record,
    check_same_words,
    manifest_of,
    quality_of,
    release,
)
from lowbit_recover.distill.settings import Settings
from lowbit_recover.distill.state import TrainingDirectory, finished_before, training_in
from lowbit_recover.distill.teacher import Cache, cache_files, fill_cache, open_cache, rows_done
from lowbit_recover.distill.tensor_patch import patch_tensors
from lowbit_recover.distill.texts import Texts, heldout_documents, load_training
from lowbit_recover.distill.trainee import Trainee, build_trainee, check_trainable
from lowbit_recover.distill.trainer import Progress, Trainer

log = get_logger("distill")

TRAINING_VERSION = 1  # raised by a change after which some training has other numbers
TEACH, TRAIN, MEASURE = "base model", "train", "measure"


@dataclass(frozen=True)
class Task:
    """A checkpoint, the model that teaches it, and the texts; all of it is checked."""

    checkpoint: ModelReference
    base: ModelReference
    manifest: Manifest
    heldout: TokenText
    texts: Texts
    settings: Settings

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the result, by name."""
        return {
            "checkpoint": {
                name: one.sha256 for name, one in self.manifest.files.items() if name.endswith(".safetensors")
            },
            "base": self.base.sha256,
            "data": self.texts.training.record.sha256,
            "set_aside_rows": self.texts.set_aside.record.sha256,
            "held-out text": self.heldout.record.sha256,
            "training_version": TRAINING_VERSION,
            **self.settings.as_record(),
        }

    @property
    def teacher_name(self) -> str:
        """Of the folder of its teacher among others: a hash of all that decides what is in it."""
        settings = self.settings
        known = [self.base.sha256, self.texts.training.record.sha256, settings.temperature, settings.top_k]
        text = json.dumps([*known, settings.hidden > 0, TRAINING_VERSION], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def teacher_files(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The files of its teacher; none where only the text teaches."""
        settings, ids = self.settings, self.texts.training.ids
        if settings.alpha == 1 and not settings.hidden:
            return {}
        config = text_config(self.base.config)
        hidden = int(config.hidden_size) if settings.hidden else 0
        rows, tokens = ids.shape
        return cache_files(rows, tokens, min(settings.top_k, int(config.vocab_size)), hidden)


def prepare(
    checkpoint: str, base: str, sources: Sequence[str], settings: Settings, *, trust_remote_code: bool = False
) -> Task:
    """Find and check everything before the first second of training; raises an InputError."""
    reference = find_model(checkpoint, trust_remote_code=trust_remote_code)
    teacher = find_model(base, trust_remote_code=trust_remote_code)
    manifest = manifest_of(reference)
    verify_files(reference.path, manifest, hashes=False)
    check_trainable(reference, settings.train)
    check_same_words(reference, teacher)
    fetch_weights(teacher)
    recipe, tokenizer = parse_recipe(manifest.recipe, "of the manifest"), reference.tokenizer()
    vocabulary = int(text_config(reference.config).vocab_size)
    heldout = load_texts(recipe.calibration, recipe.quality, tokenizer, vocabulary)[1]
    documents = heldout_documents(recipe.quality, recipe.calibration)
    texts = load_training(sources, settings, heldout, documents, tokenizer, vocabulary)
    log.info(
        "%d rows of %d tokens train, %d judge; %d documents are dropped, which share words with held-out text",
        *texts.training.ids.shape, len(texts.set_aside.ids), texts.dropped,
    )  # fmt: skip
    return Task(reference, teacher, manifest, heldout, texts, settings)


def distill(
    task: Task, out: Path, device: torch.device, *, overwrite: bool = False, cache: Path | None = None,
    moments_on_disk: bool = False,
) -> Manifest:  # fmt: skip
    """Train the checkpoint of a task into `out`, and return the manifest that was written.

    An identical finished training is reused, an identical unfinished one gone on with, unless `overwrite`. The teacher
    lies in `cache` and stays there, or in `out` until the training ends, and so does the optimizer's state with
    `moments_on_disk`. Of several ranks all train, and the first does everything else.
    """
    identity = task.identity
    finished = ranks.by_first(lambda: None if overwrite else finished_before(out, identity))
    if finished:
        log.info("%s already holds this very checkpoint; nothing to do", out)
        return finished
    folder = (cache / task.teacher_name if cache else TrainingDirectory(out).teacher).resolve()
    if not ranks.is_first():
        _helped(task, out, folder, device, moments_on_disk=moments_on_disk)
        return ranks.by_first(lambda: task.manifest)  # the first's
    check_disk(out, disk_bytes(task.manifest, task.checkpoint, task.settings, task.teacher_files))
    with training_in(out, identity, overwrite=overwrite) as directory:
        manifest = _made(task, folder, directory, device, moments_on_disk=moments_on_disk)
    return ranks.by_first(lambda: manifest)


def _made(
    task: Task, folder: Path, directory: TrainingDirectory, device: torch.device, *, moments_on_disk: bool
) -> Manifest:
    """The whole story, as the first rank has it; `folder` is the teacher's."""
    clock = Clock()
    clock.begin(TEACH)
    with ranks.alone():
        reference, teacher = _taught(task, folder, directory, device)
        before = quality_of(task.checkpoint, reference.heldout, task.heldout, device, "before")
    ranks.wait_for_first()
    clock.begin(TRAIN)
    trainee, progress = _trained(task, reference, teacher, directory, device, moments_on_disk=moments_on_disk)
    with ranks.alone():
        count = sum(one.numel() for one in trainee.trained.values())
        changed = _write(task, trainee, directory)
        del trainee
        release()
        clock.begin(MEASURE)
        result = find_model(str(directory.result))
        after = quality_of(result, reference.heldout, task.heldout, device, "after")
    manifest = _manifest(task, before, after, clock, device, directory)
    step = manifest.steps[-1].model_copy(
        update={
            "trained_parameters": count,
            "changed_bytes": changed,
            "curve": progress.curve,
            "best_step": progress.best_step,
            "seconds": round(manifest.run.seconds + progress.earlier_s, 2),
            "cpu_seconds": round(manifest.run.cpu_seconds + progress.earlier_cpu_s, 2),
        }
    )
    return _settled(task, manifest.model_copy(update={"steps": [*manifest.steps[:-1], step]}), directory)


def _helped(task: Task, out: Path, folder: Path, device: torch.device, *, moments_on_disk: bool) -> None:
    """What the other ranks do: gradients, once the teacher is whole."""
    ranks.wait_for_first()
    teacher = open_cache(folder, task.teacher_files, writable=False) if task.teacher_files else None
    _trained(task, None, teacher, TrainingDirectory(out), device, moments_on_disk=moments_on_disk)


def _taught(
    task: Task, folder: Path, directory: TrainingDirectory, device: torch.device
) -> tuple[Reference, Cache | None]:
    """What the base gives: states that judge, and the teacher's cache, whole."""
    files, ids = task.teacher_files, task.texts.training.ids
    teacher = open_cache(folder, files, writable=True) if files else None
    base = load_model(task.base, device, fp8_cache=False)
    heldout = run_text(base, task.heldout, "base: held-out text")
    aside = run_text(base, task.texts.set_aside, "base: rows set aside").hidden
    if teacher is not None and rows_done(folder) < len(ids):
        fill_cache(teacher, folder, directory.scratch, base, ids, task.settings.temperature)
    del base
    release()
    return Reference(heldout, aside), open_cache(folder, files, writable=False) if files else None


def _trained(
    task: Task,
    reference: Reference | None,
    teacher: Cache | None,
    directory: TrainingDirectory,
    device: torch.device,
    *,
    moments_on_disk: bool,
) -> tuple[Trainee, Progress]:
    """The trainee at its best on the first rank, which alone has what judges it."""
    settings = task.settings
    trainee = build_trainee(
        task.checkpoint, settings.train, device, settings.precision, checkpointing=settings.checkpointing
    )

    def judge() -> float:
        assert reference is not None, "the first rank judges"
        return set_aside_divergence(trainee, reference, task.texts.set_aside)

    moments = directory.moments(ranks.rank()) if moments_on_disk else None
    ids = task.texts.training.ids
    trainer = Trainer(trainee, settings, ids, teacher, judge, directory, moments=moments)
    count = sum(one.numel() for one in trainee.trained.values())
    log.info("%d parameters train for %d steps", count, trainer.steps)
    progress = trainer.run()
    log.info(
        "set-aside KL %.4f before, %.4f after step %d, which is kept",
        progress.curve[0][1], progress.best, progress.best_step,
    )  # fmt: skip
    return trainee, progress


@torch.no_grad()
def set_aside_divergence(trainee: Trainee, reference: Reference, text: TokenText) -> float:
    """Mean KL of the base to the trainee on the rows that are set aside, over the whole vocabulary, nats."""
    base, same = reference.heldout, nn.Identity()
    rows = text.ids.split(max(1, BATCH_TOKENS // text.ids.shape[1]))
    ours = torch.cat([trainee.hidden(ids).to(reference.set_aside.dtype).cpu() for ids in rows])
    head = trainee.head.detach().to(base.head.dtype).cpu()
    own = None if torch.equal(head, base.head) else head
    found = kl.compare(reference.set_aside, ours, same, same, base.head, text.ids, own, base.logits)
    return float(found.kld.mean())


def _write(task: Task, trainee: Trainee, directory: TrainingDirectory) -> int:
    """The checkpoint's files with what was trained, under a manifest that lets them be read; how many bytes changed."""
    result, source = directory.result, task.checkpoint.path
    for name in task.manifest.files:
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, result / name)
    tensors = trainee.tensors()
    changed = sum(patch_tensors(path, tensors) for path in sorted(result.glob("*.safetensors")))
    write_manifest(result, task.manifest.model_copy(update={"files": _files(task, result)}))
    return changed


def _files(task: Task, result: Path) -> dict[str, Any]:
    return record_files(result, [name for name in task.manifest.files if "/" in name])


def _manifest(
    task: Task, before: QualityRecord, after: QualityRecord, clock: Clock, device: torch.device,
    directory: TrainingDirectory,
) -> Manifest:  # fmt: skip
    """The manifest of the result, but for what the training itself knows."""
    manifest, run = task.manifest, clock.record(str(device))
    recipe = parse_recipe(manifest.recipe, "of the manifest")
    known = manifest.quality if manifest.quality.heldout.sha256 == after.heldout.sha256 else None
    beside = ("noise_floor", "kv_cache_alone")
    quality = after.model_copy(update={name: getattr(known, name, None) for name in beside})
    base, base_bytes = base_record(manifest, task.base)
    step = StepRecord(
        step="distill",
        what=described(task.settings),
        mean_kld=after.mean_kld,
        kld_stderr=after.kld_stderr,
        bytes=manifest.size.bytes,
        seconds=run.seconds,
        cpu_seconds=run.cpu_seconds,
        kld_before=before.mean_kld,
        kld_before_stderr=before.kld_stderr,
        settings=task.settings.as_record(),
        data=task.texts.training.record,
        identity=task.identity,
    )
    limits = recipe.quality.model_copy(update={"max_overfitting": None})  # told of calibration alone
    return manifest.model_copy(
        update={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "base": base,
            "size": manifest.size.model_copy(update={"base_bytes": base_bytes}),
            "quality": quality,
            "gate": kl.judge(quality, limits),
            "files": _files(task, directory.result),
            "versions": tool_versions(),
            "run": run,
            "steps": [*(manifest.steps or [first_step(manifest, before)]), step],
        }
    )


def first_step(manifest: Manifest, measured: QualityRecord) -> StepRecord:
    """The run of quantize that made a checkpoint, as a step; `measured` is its quality, read as later steps' is."""
    passes = [next(iter(one)) if isinstance(one, dict) else one for one in manifest.recipe.get("passes", ())]
    schemes = sorted({module.scheme for module in manifest.modules})
    return StepRecord(
        step="quantize",
        what=", ".join([one for one in passes if one != "quantize"] + schemes) or "16 bits",
        mean_kld=measured.mean_kld,
        kld_stderr=measured.kld_stderr,
        bytes=manifest.size.bytes,
        seconds=manifest.run.seconds,
        cpu_seconds=manifest.run.cpu_seconds,
    )


def described(settings: Settings) -> str:
    """A training in a few words."""
    soft = f"T {settings.temperature:g}, top {settings.top_k}" if settings.alpha < 1 else "text alone"
    mixed = f", alpha {settings.alpha:g}" if 0 < settings.alpha < 1 else ""
    return f"{settings.train}, {soft}{mixed}"


def _settled(task: Task, manifest: Manifest, directory: TrainingDirectory) -> Manifest:
    """Move the result to its place; the manifest comes last."""
    out, result = directory.out, directory.result
    card = write_card(result, manifest, task.base.path if task.base.kind != "gguf" else None)
    manifest = manifest.model_copy(update={"files": manifest.files | {card.name: file_record(card)}})
    for name in manifest.files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        move(result / name, out / name)
    (result / MANIFEST_NAME).unlink()
    write_manifest(out, manifest)
    return manifest
