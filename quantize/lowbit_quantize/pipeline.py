"""The story of a quantize run: check, walk down the model once, write, compare with the base, prove."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit_core.durable import move
from lowbit_core.errors import RecipeError
from lowbit_core.log import get_logger
from lowbit_core.manifest import Manifest, QualityRecord, write_manifest
from lowbit_core.manifest_files import file_record
from lowbit_quantize.card import write_card
from lowbit_quantize.catalog import CATALOG, Catalog
from lowbit_quantize.check.forecast import run_disk_bytes, streams_bytes
from lowbit_quantize.check.reload import TokenizerAnswers, answers_of, check_reload
from lowbit_quantize.check.weights import Base, base_of, check_numbers, checked_base, say_rest, stored_weights
from lowbit_quantize.check.zeros import check_zeros
from lowbit_quantize.depth.choice import kept_layers
from lowbit_quantize.device import ranks
from lowbit_quantize.device.memory import return_freed_memory
from lowbit_quantize.model.decoder import Decoder, Weights
from lowbit_quantize.model.files.leftovers import draft_linears
from lowbit_quantize.model.reference import ModelReference, fetch_weights, find_model
from lowbit_quantize.model.resized import OpenModel
from lowbit_quantize.model.shallower import KeptLayers
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.plan import Plan, make_plan
from lowbit_quantize.quality.dataset import TokenText, load_texts
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.record import manifest_of
from lowbit_quantize.run.clock import CONCLUDE, Clock
from lowbit_quantize.run.companions import CARD, Companions, companions, copy_companions
from lowbit_quantize.run.directory import (
    RunDirectory,
    check_disk,
    finished_before,
    refuse_foreign,
    run_of_ranks,
)
from lowbit_quantize.run.hidden_states import MEMORY_BYTES
from lowbit_quantize.run.identity import identity_of, texts_of
from lowbit_quantize.run.journal import ChosenLayers, TrialResult
from lowbit_quantize.run.older_readers import name_known_tokenizer
from lowbit_quantize.run.served_config import quantization_config, served_config
from lowbit_quantize.run.writer import CheckpointWriter
from lowbit_quantize.walk.dropped import DroppedLayers
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
    ranks.by_first(lambda: refuse_foreign(out))
    texts, answers = _texts(plan)
    _fetch(reference)
    stored = stored_weights(plan)
    base = checked_base(plan, stored)
    check_drafts(plan, base)
    hashes = texts_of(texts[0].record, texts[1].record)
    identity = ranks.by_first(lambda: identity_of(plan.recipe, reference.sha256, hashes, device))
    finished = ranks.by_first(lambda: None if overwrite else finished_before(out, identity))
    if finished:
        log.info("%s already holds this very checkpoint; nothing to do", out)
        return finished
    ranks.by_first(lambda: check_disk(out, _disk_bytes(plan, texts, stream_memory_bytes, base)))
    with run_of_ranks(out, identity, overwrite=overwrite) as run:
        base = _ready(plan, stored, base, run)
        plan = _decided(plan, base, texts[0], run, device, catalog)
        walk, measured = _finished_walk(device, plan, base, texts, run, stream_memory_bytes, clock)
        clock.begin(CONCLUDE)

        def conclude() -> Manifest:
            beside = write_rest(plan, base, walk, run)
            check_reload(out, base.foreign, answers, walk.unopened, trust_remote_code=trust_remote_code)
            manifest = manifest_of(plan, base, beside, walk, texts[0], measured, clock, run)
            check_zeros(plan, out, manifest.modules)
            card = write_card(out, manifest, base.weights.files.directory)
            manifest = manifest.model_copy(update={"files": manifest.files | {card.name: file_record(card)}})
            write_manifest(out, manifest)
            return manifest

        return ranks.by_first(conclude)


def _disk_bytes(
    plan: Plan, texts: tuple[TokenText, TokenText], stream_memory_bytes: int, base: Base | None
) -> int:
    carried = base.carried_bytes if base else 0
    return run_disk_bytes(plan, streams_bytes(plan, *texts), stream_memory_bytes, carried)


def check_drafts(plan: Plan, base: Base | None) -> None:
    """Draft layers are numbered after the model's own, of which there will be fewer; raises RecipeError."""
    drafts = list(draft_linears(base.rest.carried)) if base is not None and plan.dropping else []
    if drafts:
        raise RecipeError(
            f"drop_layers: {plan.reference.name} carries draft layers ({drafts[0]}), whose numbers follow those of all "
            "its layers; leave them out by base.leave_out, or leave the pass out"
        )


def _decided(
    plan: Plan, base: Base, text: TokenText, run: RunDirectory, device: torch.device, catalog: Catalog
) -> Plan:
    """The plan with the layers that go, which are measured on the base unless that was done before."""
    dropping, model = plan.dropping, plan.base
    if dropping is None or dropping.kept is not None:
        return plan
    asked = dropping.recipe

    def chosen() -> ChosenLayers:
        found = run.layers
        if found is None:
            decoder = Decoder(
                model.config, model.architecture, base.weights, device, model.skeleton, plan.dtype
            )
            ids = text.ids[: asked.num_samples]
            kept, scores = kept_layers(decoder, ids, dropping.count, asked.criterion, asked.seed)
            found = ChosenLayers(kept=list(kept), scores=scores)
            run.choose_layers(found)
        return found

    return make_plan(plan.reference, plan.recipe, catalog, ranks.by_first(chosen).kept)


def _texts(plan: Plan) -> tuple[tuple[TokenText, TokenText], TokenizerAnswers]:
    """Calibration and held-out text, and what the tokenizer, which is not kept, answers for the proof."""
    tokenizer, recipe = plan.reference.tokenizer(), plan.recipe
    texts = load_texts(recipe.calibration, recipe.quality, tokenizer, plan.config.vocab_size)
    return texts, answers_of(tokenizer, texts[1])


def _fetch(reference: ModelReference) -> None:
    """The base's weights from the hub, by the first rank; the others find them there."""
    ranks.by_first(lambda: fetch_weights(reference))
    if not ranks.is_first():
        fetch_weights(reference)


def _finished_walk(
    device: torch.device,
    plan: Plan,
    base: Base,
    texts: tuple[TokenText, TokenText],
    run: RunDirectory,
    memory_bytes: int,
    clock: Clock,
) -> tuple[Walk, QualityRecord]:
    """The walk whose shards lie in the output, and its quality; passes on trial stay if they lower held-out KL."""
    decoder, dropped = _decoders(plan, base, device)

    def prepared(name: str, passes: tuple[Pass, ...], directory: Path) -> Walk:
        baselines, alone = plan.baselines(texts[1].domains), not base.foreign
        by_head = plan.scales_by_head
        work = Work(
            plan.modules,
            passes,
            plan.paired,
            plan.fp8_layers,
            baselines,
            alone,
            by_head,
            plan.names,
            dropped,
            plan.compensates,
        )
        shards = decoder.depth + plan.quantizes_head + 1 + len(base.carried_shards)
        writer = CheckpointWriter(directory, shards, scratch=run.scratch)
        return Walk(decoder, work, texts, writer, run.journal(name), memory_bytes, clock)

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
        result = TrialResult(kept=with_them < without, kld_without=without, kld_with=with_them)
        ranks.by_first(lambda: run.end_trial(result))
    if run.trial is not None and run.trial.kept:
        return walked(prepared(WALK, plan.passes, run.out))
    ranks.by_first(lambda: run.keep_shards(WITHOUT, run.journal(WITHOUT).shards))
    return walked(prepared(WITHOUT, settled, run.out))


def _decoders(plan: Plan, base: Base, device: torch.device) -> tuple[Decoder, DroppedLayers | None]:
    """The model that walks, and the base's layers that do not."""

    def opened(model: OpenModel, weights: Weights) -> Decoder:
        return Decoder(model.config, model.architecture, weights, device, model.skeleton, plan.dtype)

    kept = plan.dropping.kept if plan.dropping else None
    if kept is None:
        return opened(plan.walked, base.weights), None
    weights = KeptLayers(base.weights, plan.architecture.layers, kept)
    return opened(plan.walked, weights), DroppedLayers(opened(plan.base, base.weights), kept)


def write_rest(plan: Plan, base: Base, walk: Walk, run: RunDirectory) -> Companions:
    """Write what lies outside the layers, the index, the configuration, and copies of what lies beside the weights."""
    decoder, architecture = walk.decoder, plan.architecture
    names = [name for name in plan.skeleton.state_dict() if name in base.weights.wanted.text]
    written = [architecture.layers] + [architecture.head] * (plan.tied or plan.quantizes_head)
    written += [architecture.final_norm] * plan.quantizes_head
    outside = [name for name in names if not name.startswith(tuple(f"{one}." for one in written))]
    walk.writer.write_shard(plan.names.publish({name: decoder.read(name) for name in outside}))
    for shard in base.carried_shards:
        walk.writer.write_shard({name: base.read_carried(name, decoder.dtype) for name in shard})
    files = base.weights.files
    beside = companions(files.directory, files.files)
    run.note_copies([*beside.copied, CARD])
    copy_companions(files.directory, beside.copied, run.out)
    name_known_tokenizer(run.out)
    walk.writer.finish(_configuration(plan, base))
    return beside


def _configuration(plan: Plan, base: Base) -> dict[str, Any]:
    """`config.json` of the checkpoint."""
    schemes = {
        known: entry.scheme
        for name, entry in plan.modules.items()
        if plan.stays(name) and entry.compressed
        for known in plan.architecture.engine_names(name, plan.names.published(name))
    }
    unquantized = (*plan.unquantized, *plan.plain, *draft_linears(base.rest.carried))
    return served_config(
        plan.served.config,
        plan.reference.written_config,
        plan.configuration | base.rest.changed,
        quantization_config(schemes, unquantized, fp8_cache=plan.fp8_cache, by_head=plan.scales_by_head),
        plan.dtype,
        type(plan.skeleton).__name__,
    )


def _ready(plan: Plan, stored: "WeightFiles | GgufFile", base: Base | None, run: RunDirectory) -> Base:
    """The base to walk, whose numbers fit; that of a GGUF file is there once the file is unpacked."""
    if not isinstance(stored, WeightFiles):
        base = _unpacked(plan, stored, run)
    assert base is not None
    check_numbers(plan, base)
    say_rest(base.rest)
    return base


def _unpacked(plan: Plan, stored: "GgufFile", run: RunDirectory) -> Base:
    """The GGUF file as a directory; one that is whole is used again."""

    def unpack() -> None:
        if not run.base.is_dir():
            log.info("unpacking %s", stored.path.name)
            stored.unpack(run.scratch / run.base.name)
            return_freed_memory()
            move(run.scratch / run.base.name, run.base)

    ranks.by_first(unpack)
    return base_of(plan, WeightFiles(run.base, unpacked_from=stored.files))
