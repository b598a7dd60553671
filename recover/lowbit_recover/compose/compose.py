"""The story of a composition: each step a checkpoint of its own, judged against the model that was first.

Steps lie in folders of the output directory, `1-quantize`, `2-distill` and so on. A step that is finished is not made
again, one that was stopped goes on where it was, so the same command resumes the whole. The last step's folder is the
result; its manifest has the cost and the gain of every step.
"""

import json
from pathlib import Path
from typing import Any

import torch

from lowbit_core.errors import OutputError
from lowbit_core.log import get_logger
from lowbit_core.manifest import Manifest, read_manifest, write_manifest
from lowbit_core.manifest_files import file_record
from lowbit_evaluate.heldout_text import run_text
from lowbit_evaluate.loaded_model import load_model
from lowbit_quantize.card import write_card
from lowbit_quantize.model.reference import ModelReference, find_model
from lowbit_quantize.model.skeleton import text_config
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.quality import kl
from lowbit_quantize.quality.dataset import load_texts
from lowbit_quantize.recipe import Recipe, parse_recipe
from lowbit_recover.compose.steps_file import QuantizeStep, Steps
from lowbit_recover.distill.distill import distill, first_step, prepare
from lowbit_recover.distill.measured import base_record, quality_of, release

log = get_logger("compose")

STEPS_NAME = "steps.json"  # what the folders are of


def compose(
    model: str, steps: Steps, out: Path, device: torch.device, *, trust_remote_code: bool = False
) -> tuple[Manifest, Path]:
    """Run all steps; the manifest of the last one and its folder. Raises what its steps raise."""
    base = find_model(model, trust_remote_code=trust_remote_code)
    _begin(out, base, steps)
    previous = model
    manifest: Manifest | None = None
    for place, step in enumerate(steps.steps, 1):
        folder = out / f"{place}-{step.kind}"
        log.info("step %d of %d: %s", place, len(steps.steps), step.kind)
        if step.quantize is not None:
            manifest = _quantized(base, previous, step.quantize, folder, manifest, device, trust_remote_code)
        elif step.distill is not None:
            task = prepare(
                previous, model, step.distill.data, step.distill.read(), trust_remote_code=trust_remote_code
            )
            manifest = distill(task, folder, device)
        previous = str(folder)
    assert manifest is not None, "there is a first step"
    return manifest, Path(previous)


def _begin(out: Path, base: ModelReference, steps: Steps) -> None:
    """Note whose folders these are; OutputError where they are another's."""
    wanted = {"model": base.sha256, "steps": steps.model_dump(mode="json", exclude={"description"})}
    path = out / STEPS_NAME
    try:
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if _common(found, wanted):
                return
            raise OutputError(
                f"output {out} holds a composition of another model or of other steps; give a new directory. Steps may "
                "be added at the end of those that it has"
            )
        if out.is_dir() and any(out.iterdir()):
            raise OutputError(f"output {out} holds something else; give a directory that is new or empty")
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"output {out}: {error.strerror or error}; give another directory") from error


def _common(found: Any, wanted: dict[str, Any]) -> bool:
    """Whether one list of steps is the beginning of the other, of one model."""
    if not isinstance(found, dict) or found.get("model") != wanted["model"]:
        return False
    had = found.get("steps", {}).get("steps", [])
    return all(one == other for one, other in zip(had, wanted["steps"]["steps"], strict=False))


def _quantized(
    base: ModelReference,
    previous: str,
    step: QuantizeStep,
    folder: Path,
    before: Manifest | None,
    device: torch.device,
    trust_remote_code: bool,
) -> Manifest:
    """A step of quantize, measured against the model that was first once it is not made of that itself."""
    recipe = step.read()
    if before is None:
        return quantize(previous, recipe, folder, device, trust_remote_code=trust_remote_code)
    identity = {"recipe": recipe.model_dump(mode="json"), "model": find_model(previous).sha256}
    finished = read_manifest(folder) if (folder / "lowbit.json").is_file() else None
    if finished and finished.steps and finished.steps[-1].identity == identity:
        log.info("%s already holds this very step", folder)
        return finished
    if finished and not finished.steps:  # stopped while its card was written anew
        write_card(folder, finished, Path(previous))
    made = quantize(previous, recipe, folder, device, trust_remote_code=trust_remote_code)
    return _measured_anew(base, folder, made, before, recipe, identity, device)


def _measured_anew(
    base: ModelReference,
    folder: Path,
    made: Manifest,
    before: Manifest,
    recipe: Recipe,
    identity: dict[str, Any],
    device: torch.device,
) -> Manifest:
    """The manifest of a later step: its quality is that against the first model, its steps are all so far."""
    reference = find_model(str(folder))
    own = parse_recipe(made.recipe, "of the manifest")
    vocabulary = int(text_config(reference.config).vocab_size)
    heldout = load_texts(own.calibration, own.quality, reference.tokenizer(), vocabulary)[1]
    teacher = load_model(base, device, fp8_cache=False)
    states = run_text(teacher, heldout, "first model: held-out text")
    del teacher
    release()
    quality = quality_of(reference, states, heldout, device, "this step")
    steps = before.steps or [first_step(before, before.quality)]
    last = first_step(made, quality).model_copy(
        update={"identity": identity, "kld_before": before.quality.mean_kld}
    )
    record, base_bytes = base_record(made, base)
    manifest = made.model_copy(
        update={
            "base": record,
            "size": made.size.model_copy(update={"base_bytes": base_bytes}),
            "quality": quality,
            "gate": kl.judge(quality, recipe.quality.model_copy(update={"max_overfitting": None})),
            "steps": [*steps, last],
        }
    )
    card = write_card(folder, manifest, base.path if base.kind != "gguf" else None)
    manifest = manifest.model_copy(update={"files": manifest.files | {card.name: file_record(card)}})
    write_manifest(folder, manifest)
    return manifest
