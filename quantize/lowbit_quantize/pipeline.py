"""The story of a quantize run: check, walk down the model once, write, compare with the base, prove."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowbit_core.durable import move
from lowbit_core.log import get_logger
from lowbit_core.manifest import Manifest, QualityRecord, write_manifest
from lowbit_quantize.catalog import CATALOG, Catalog
from lowbit_quantize.check.forecast import run_disk_bytes, streams_bytes
from lowbit_quantize.check.weights import check_weights, stored_weights
from lowbit_quantize.device.memory import return_freed_memory
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.reference import fetch_weights, find_model
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.plan import Plan, make_plan
from lowbit_quantize.quality.dataset import TokenText, load_texts
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.record import Clock, manifest_of
from lowbit_quantize.run.directory import RunDirectory, check_disk, finished_before, refuse_foreign, run_in
from lowbit_quantize.run.hidden_states import MEMORY_BYTES
from lowbit_quantize.run.identity import identity_of, texts_of
from lowbit_quantize.run.journal import TrialResult
from lowbit_quantize.run.served_config import quantization_config, served_config
from lowbit_quantize.run.writer import CheckpointWriter
from lowbit_quantize.walk.forward import Walk, Work
from lowbit_quantize.walk.layer import Pass

if TYPE_CHECKING:
    from lowbit_quantize.model.gguf_file import GgufFile

log = get_logger("quantize")

WALK, WITHOUT = "walk", "without"  # journals: the recipe's walk, and the one without passes that are on trial


def quantize(
    model: str,
    recipe: Recipe,
    out: Path,
    device: torch.device,
    *,
    overwrite: bool = False,
    stream_memory_bytes: int = MEMORY_BYTES,
    trust_remote_code: bool = False,
    catalog: Catalog = CATALOG,
) -> Manifest:
    """Quantize `model` into `out` and return the manifest that was written.

    An identical finished run is reused, an identical unfinished one is gone on with, unless `overwrite`. Hidden
    states beyond `stream_memory_bytes` are files.
    """
    clock = Clock()
    reference = find_model(model, trust_remote_code=trust_remote_code)
    plan = make_plan(reference, recipe, catalog)
    refuse_foreign(out)
    texts = load_texts(recipe.calibration, recipe.quality, reference.tokenizer(), reference.config.vocab_size)
    fetch_weights(reference)
    stored = stored_weights(plan)
    check_weights(plan, stored)
    hashes = texts_of(texts[0].record, texts[1].record)
    identity = identity_of(plan.recipe, reference.sha256, hashes, device)
    if not overwrite and (finished := finished_before(out, identity)):
        log.info("%s already holds this very checkpoint; nothing to do", out)
        return finished
    streams = streams_bytes(plan, *texts)
    check_disk(out, run_disk_bytes(plan, streams, stream_memory_bytes))
    with run_in(out, identity, overwrite=overwrite) as run:
        weights = stored if isinstance(stored, WeightFiles) else _unpacked(stored, run)
        decoder = Decoder(reference.config, plan.architecture, weights, device, plan.skeleton)
        walk, measured = _finished_walk(decoder, plan, texts, run, stream_memory_bytes)
        write_rest(plan, walk)
        manifest = manifest_of(plan, walk, texts[0], measured, clock, run)
        write_manifest(out, manifest)
    return manifest


def _finished_walk(
    decoder: Decoder, plan: Plan, texts: tuple[TokenText, TokenText], run: RunDirectory, memory_bytes: int
) -> tuple[Walk, QualityRecord]:
    """The walk whose shards lie in the output, and its quality; passes on trial stay if they lower held-out KL."""

    def prepared(name: str, passes: tuple[Pass, ...], directory: Path) -> Walk:
        work = Work(plan.modules, passes, plan.paired, plan.fp8_cache, plan.baselines(texts[1].domains))
        writer = CheckpointWriter(directory, decoder.depth + 1, scratch=run.scratch)
        return Walk(decoder, work, texts, writer, run.journal(name), memory_bytes)

    def walked(walk: Walk) -> tuple[Walk, QualityRecord]:
        walk.run()
        return walk, walk.quality()

    settled = tuple(one for one in plan.passes if not one.on_trial)
    if settled == plan.passes:
        return walked(prepared(WALK, plan.passes, run.out))
    if run.trial is None:
        without = walked(prepared(WITHOUT, settled, run.shards(WITHOUT)))[1].mean_kld
        with_them = walked(prepared(WALK, plan.passes, run.out))[1].mean_kld
        names = ", ".join(one.name for one in plan.passes if one.on_trial)
        log.info("%s: mean KL %.4g with, %.4g without", names, with_them, without)
        run.end_trial(TrialResult(kept=with_them < without, kld_without=without, kld_with=with_them))
    if run.trial is not None and run.trial.kept:
        return walked(prepared(WALK, plan.passes, run.out))
    run.keep_shards(WITHOUT, [record.shard for record in run.journal(WITHOUT).layers])
    return walked(prepared(WITHOUT, settled, run.out))


def write_rest(plan: Plan, walk: Walk) -> None:
    """Write what lies outside the layers, the index, the configuration and the tokenizer."""
    decoder, architecture = walk.decoder, plan.architecture
    config = copy.deepcopy(decoder.config)
    names = map(architecture.published_name, plan.skeleton.state_dict())
    outside = [name for name in names if not name.startswith(f"{architecture.layers}.")]
    if config.tie_word_embeddings:
        outside.remove(f"{architecture.head}.weight")
    walk.writer.write_shard({name: decoder.weights.read(name).to(decoder.dtype) for name in outside})
    for key, value in plan.configuration.items():
        setattr(config, key, value)
    schemes = {
        known: entry.scheme
        for name, entry in plan.modules.items()
        if plan.stays(name)
        for known in architecture.engine_names(name)
    }
    quantization = quantization_config(schemes, plan.unquantized, fp8_cache=plan.fp8_cache)
    served = served_config(config, quantization, decoder.dtype)
    served["architectures"] = [type(plan.skeleton).__name__]
    walk.writer.finish(decoder.weights.directory, served)


def _unpacked(stored: "GgufFile", run: RunDirectory) -> WeightFiles:
    """The GGUF file as a directory; one that is whole is used again."""
    if not run.base.is_dir():
        log.info("unpacking %s", stored.path.name)
        stored.unpack(run.scratch / run.base.name)
        return_freed_memory()
        move(run.scratch / run.base.name, run.base)
    return WeightFiles(run.base, unpacked_from=stored.files)
