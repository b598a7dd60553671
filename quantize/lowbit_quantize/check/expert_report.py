"""Which criterion errs least on this model: scores, choices and errors of every criterion, before any checkpoint; and
what merging instead of dropping changes, with the experts that the recipe's criterion keeps.

One walk of the base model over the calibration text. At each layer with routed experts every criterion chooses what
stays, and the block is run again on a sample of its inputs with the router so pruned; the error is
‖pruned block − block‖² / ‖block‖² on that sample. It is the error of that layer alone, on calibration text: a hint
where to look, which the held-out KL of a real run confirms or not (arXiv 2606.10703 found no criterion that predicts
it everywhere). Nothing is chosen here.
"""

import copy
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowbit_core.errors import OutputError, RecipeError
from lowbit_core.progress import track
from lowbit_quantize.check.weights import base_of
from lowbit_quantize.model.architecture import kind_of
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.experts.linears import expert_outputs
from lowbit_quantize.model.experts.routing import Routing, routed_sum_of
from lowbit_quantize.model.reference import fetch_weights, find_model
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.passes.distill_router import SAMPLE_TOKENS, bounded
from lowbit_quantize.passes.merge_experts import Consolidation
from lowbit_quantize.passes.prune_experts import (
    PruneExperts,
    PruneExpertsKind,
    PruneExpertsOptions,
    choose,
)
from lowbit_quantize.plan import Plan, make_plan
from lowbit_quantize.quality.dataset import load_texts
from lowbit_quantize.recipe import KVCache, Recipe
from lowbit_quantize.statistics.expert_saliency import CRITERIA, ExpertSaliency, routing_of, score
from lowbit_quantize.statistics.expert_similarity import NEARNESS
from lowbit_quantize.statistics.sample import Sample

SHARES = (0.25, 0.5)  # reported where the recipe prunes nothing
RANDOM_SEEDS = 5  # over which the error of `random` is a mean
MERGINGS = {
    f"{consolidate} by {similarity}": {"consolidate": consolidate, "similarity": similarity}
    for consolidate in get_args(Consolidation)
    for similarity in NEARNESS
}


def report_experts(
    model: str, recipe: Recipe, file: Path, device: torch.device, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write the report on `model` to `file` and return it; raises RecipeError on a model without experts."""
    if not file.resolve().parent.is_dir() or file.is_dir():
        raise OutputError(f"--experts-report {file}: give a file in a directory that exists")
    reference = find_model(model, trust_remote_code=trust_remote_code)
    pruning = tuple(step for step in recipe.passes if step.name == PruneExpertsKind.name)
    plain = {"modules": (), "passes": pruning, "kv_cache": KVCache(dtype="none")}
    plan = make_plan(reference, recipe.model_copy(update=plain))
    prunings = _prunings(plan)
    if reference.kind == "gguf":
        raise RecipeError(
            f"{model} is a GGUF file; the report on experts reads directories of safetensors, give one"
        )
    vocabulary = plan.config.vocab_size
    text = load_texts(recipe.calibration, recipe.quality, reference.tokenizer(), vocabulary)[0]
    fetch_weights(reference)
    weights = base_of(plan, WeightFiles(reference.path)).weights
    decoder = Decoder(reference.config, plan.architecture, weights, device, plan.skeleton, plan.dtype)
    report = {
        "model": reference.name,
        "calibration": text.record.model_dump(),
        "experts": prunings[0].experts,
        "merged_from": prunings[0].recipe.criterion,
        **_summary(layers := _layer_reports(decoder, prunings, text.ids)),
        "layers": layers,
    }
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def table(report: dict[str, Any]) -> str:
    """The mean error over layers of each criterion, as Markdown."""
    errors = report["mean_error"]
    lines = [
        f"Relative squared error of a block's output, mean of {len(report['layers'])} layers, by how many of "
        f"{report['experts']} experts stay:",
        "",
        "| criterion | " + " | ".join(f"{kept} stay" for kept in errors) + " |",
        "|---" * (1 + len(errors)) + "|",
    ]
    for criterion in (*CRITERIA, "random"):
        cells = (
            f"{by[criterion]:.4f}" + (" *" if report["least_error"][kept] == criterion else "")
            for kept, by in errors.items()
        )
        lines.append(f"| {criterion} | " + " | ".join(cells) + " |")
    for merging in MERGINGS:
        cells = (f"{by[merging]:.4f}" for by in report["merging_error"].values())
        lines.append(f"| {report['merged_from']}, {merging} | " + " | ".join(cells) + " |")
    super_experts = [
        f"{layer['layer']}:{expert}" for layer in report["layers"] for expert in layer["super_experts"]
    ]
    lines += ["", "* errs least", f"super-experts (layer:expert): {', '.join(super_experts) or 'none'}"]
    return "\n".join(lines)


def _prunings(plan: Plan) -> list[PruneExperts]:
    """The recipe's pruning, or those of `SHARES` that fit the model where it has none."""
    found = [one for one in plan.passes if isinstance(one, PruneExperts)]
    refusal: RecipeError | None = None
    for share in () if found else SHARES:
        options = PruneExpertsOptions(prune_ratio=share)
        try:
            found.append(
                PruneExpertsKind().make(options, plan.config, plan.architecture, plan.reference.name)
            )
        except RecipeError as error:
            refusal = error
    if not found:
        assert refusal is not None
        raise refusal
    return found


def _layer_reports(decoder: Decoder, prunings: list[PruneExperts], ids: Tensor) -> list[dict[str, Any]]:
    hidden = decoder.embed(ids)
    layers = []
    for index in track(range(decoder.depth), decoder.depth, "layers"):
        layer = decoder.load_layer(index)
        if not decoder.architecture.has_experts(layer):
            decoder.advance(layer, index, hidden)
            continue
        seen, inputs = ExpertSaliency(prunings[0].experts), Sample(SAMPLE_TOKENS)
        with routing_of(layer, decoder.architecture, seen, inputs):
            decoder.advance(layer, index, hidden)
        sample = _BlockSample(layer, bounded(inputs.rows(), prunings[0].experts))
        layers.append(_layer_report(index, seen, sample, prunings))
    return layers


class _BlockSample:
    """A block's output on a sample of its inputs, and what it would be with fewer experts."""

    def __init__(self, layer: nn.Module, inputs: Tensor) -> None:
        kind = kind_of(layer)
        self.router, self.inputs = layer.get_submodule(kind.router), inputs
        experts: Any = layer.get_submodule(kind.experts)
        self.experts = experts
        self._routing = Routing(layer, kind)
        block = layer.get_submodule(kind.moe_block)
        with torch.no_grad():
            call = self._routing(inputs)
            self.called_with = call.hidden
            self._outputs = expert_outputs(self.experts, call.hidden)  # (tokens, experts, hidden)
            self._routed = routed_sum_of(call, self._outputs)
            given = block(self._routing.typed(inputs).unsqueeze(0))
            self._power = (given[0] if isinstance(given, tuple) else given).float().square().sum()

    def error(self, kept: Tensor, merged: Iterable[tuple[int, dict[str, Tensor]]] = ()) -> float:
        """Squared error of the block's output with the `kept` experts, relative to the output.

        `merged` are parameters that some of them have instead of their own, with their numbers.
        """
        with torch.no_grad():
            outputs = self._outputs[:, kept]
            for number, parameters in merged:
                given = functional_call(self.experts[number], parameters, (self.called_with,))
                outputs[:, kept == number] = given.unsqueeze(1)
            call = copy.deepcopy(self._routing).leave(kept)(self.inputs)
            given = routed_sum_of(call, outputs)
            return float((given - self._routed).square().sum() / self._power.clamp(min=1e-30))


def _layer_report(
    index: int, seen: ExpertSaliency, sample: _BlockSample, prunings: list[PruneExperts]
) -> dict[str, Any]:
    def kept(criterion: str, pruning: PruneExperts, seed: int = 0) -> Tensor:
        scores = score(seen, criterion, seed, index)
        return choose(scores, seen.super_experts, pruning.kept, pruning.groups)

    def error(criterion: str, pruning: PruneExperts) -> float:
        seeds = range(RANDOM_SEEDS) if criterion == "random" else range(1)
        return _mean(sample.error(kept(criterion, pruning, seed)) for seed in seeds)

    def merging(pruning: PruneExperts, options: Mapping[str, str]) -> dict[str, Any]:
        merging = dataclasses.replace(pruning, recipe=pruning.recipe.model_copy(update=options))
        stay = merging.keep(seen, index)
        absorbed_by, merged = merging.merge(
            sample.router, sample.experts, stay, seen, sample.inputs, sample.called_with
        )
        return {
            "absorbed_by": {str(gone): by for gone, by in absorbed_by.items()},
            "error": sample.error(stay, merged),
        }

    names = (*CRITERIA, "random")
    return {
        "layer": index,
        "tokens": seen.tokens.int().tolist(),
        "super_experts": seen.super_experts.nonzero().flatten().tolist(),
        "scores": {name: score(seen, name, 0, index).tolist() for name in names},
        "kept": {str(p.kept): {name: kept(name, p).tolist() for name in names} for p in prunings},
        "error": {str(p.kept): {name: error(name, p) for name in names} for p in prunings},
        "merging": {str(p.kept): {name: merging(p, how) for name, how in MERGINGS.items()} for p in prunings},
    }


def _summary(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors averaged over layers, by count kept and criterion, and which criterion errs least."""
    mean = {
        kept: {name: _mean(layer["error"][kept][name] for layer in layers) for name in by}
        for kept, by in layers[0]["error"].items()
    }
    least = {kept: min(by, key=lambda name: by[name]) for kept, by in mean.items()}
    merging = {
        kept: {name: _mean(layer["merging"][kept][name]["error"] for layer in layers) for name in MERGINGS}
        for kept in mean
    }
    return {"mean_error": mean, "least_error": least, "merging_error": merging}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
