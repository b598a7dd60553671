"""The story of `lowbit sensitivity`: find the model and its decisions, walk forward and back, note what was felt."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lowbit_core import __version__
from lowbit_core.errors import ConfigError, ModelError
from lowbit_quantize.check.forecast import tensor_bytes
from lowbit_quantize.check.weights import Base, base_of, check_numbers, stored_weights
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.reference import fetch_weights, find_model
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.plan import Plan, make_plan
from lowbit_quantize.quality.dataset import TokenText, load_texts
from lowbit_quantize.quality.kl import clustered_stderr
from lowbit_quantize.recipe import NONE, QUANTIZE, Recipe
from lowbit_quantize.run.clock import Clock
from lowbit_quantize.run.hidden_states import MEMORY_BYTES, HiddenStates
from lowbit_quantize.sensitivity.decisions import (
    Decision,
    decisions_of,
    entries_of,
    stored_bytes,
    weights_of,
)
from lowbit_quantize.sensitivity.progress import Progress, State
from lowbit_quantize.sensitivity.report import (
    CACHE,
    FP8_CACHE,
    Candidate,
    Choice,
    DecisionRecord,
    ModelRecord,
    Sensitivity,
)
from lowbit_quantize.sensitivity.walk import SensitivityWalk
from lowbit_quantize.walk.module_plan import Modules

TOKENS = 4096
FP8_BITS = 8
LEAST_SEQUENCES = 2  # one has no standard error


def measure(
    model: str,
    recipe: Recipe,
    candidates: Sequence[Candidate],
    tokens: int,
    device: torch.device,
    *,
    out: Path,
    seed: int = 0,
    stream_memory_bytes: int = MEMORY_BYTES,
    trust_remote_code: bool = False,
) -> Sensitivity:
    """What each decision about `model` costs by each candidate, felt on `tokens` tokens; raises InputError.

    As many tokens again are what candidates are made on. Files of hidden states, and how far it has come, lie beside
    `out`, which is not written.
    """
    clock = Clock()
    prepared = prepare(model, recipe, candidates, tokens, trust_remote_code=trust_remote_code)
    plan, calibration, scored = prepared.plan, prepared.calibration, prepared.scored
    fetch_weights(plan.reference)
    progress = Progress(out.with_name(f".{out.name}.progress"), _identity(prepared, candidates, seed, device))
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".lowbit-sensitivity-") as directory:
        base = _opened(plan, Path(directory))
        check_numbers(plan, base)
        config, architecture = plan.reference.config, plan.architecture
        decoder = Decoder(config, architecture, base.weights, device, plan.skeleton, plan.dtype)
        streams = HiddenStates(device, Path(directory), stream_memory_bytes)
        texts = calibration.ids, scored.ids
        walk = SensitivityWalk(decoder, prepared.decisions, prepared.tables, texts, streams, progress, seed)
        state = walk.run()
    progress.remove()
    return Sensitivity(
        base=ModelRecord(
            name=plan.reference.name, sha256=plan.reference.sha256, other_bytes=_other_bytes(prepared, base)
        ),
        recipe=plan.recipe.model_dump(mode="json", exclude_defaults=True),
        candidates=tuple(candidates),
        calibration=calibration.record,
        scored=scored.record,
        seed=seed,
        fp8_layers=tuple(sorted(plan.fp8_layers)),
        decisions=tuple(_records(prepared, candidates, state)),
        run=clock.record(str(device)),
    )


@dataclass(frozen=True)
class Prepared:
    """All that is known before the first token: nothing is read of the weights but their headers."""

    plan: Plan
    decisions: tuple[Decision, ...]
    tables: Mapping[str, Modules]
    calibration: TokenText
    scored: TokenText


def prepare(
    model: str,
    recipe: Recipe,
    candidates: Sequence[Candidate],
    tokens: int,
    *,
    trust_remote_code: bool = False,
) -> Prepared:
    """Check that model, recipe, candidates and text fit each other; raises InputError."""
    if any(step.name != QUANTIZE for step in recipe.passes):
        raise ConfigError(
            "lowbit sensitivity measures the base as it is, and the recipe changes it by passes; give a recipe "
            f"whose only pass is {QUANTIZE}"
        )
    reference = find_model(model, trust_remote_code=trust_remote_code)
    sequences = max(LEAST_SEQUENCES, -(-tokens // recipe.calibration.max_seq_length))
    text = recipe.calibration
    if not text.token_ids:
        text = text.model_copy(update={"num_samples": 2 * sequences})
    plan = make_plan(reference, recipe.model_copy(update={"calibration": text}))
    if not plan.architecture.stream.plain:
        raise ModelError(
            f"{reference.name}: layers of {plan.architecture.model_type} are called with more than hidden states, "
            "through which gradients are not taken back yet; choose its schemes by rules"
        )
    decisions, tables = decisions_of(plan), entries_of(plan, candidates)
    found = load_texts(text, recipe.quality, reference.tokenizer(), plan.config.vocab_size)[0]
    return Prepared(plan, decisions, tables, *_halves(found, tokens))


def _identity(prepared: Prepared, candidates: Sequence[Candidate], seed: int, device: torch.device) -> str:
    """What must be the same for a killed run to be gone on with."""
    plan = prepared.plan
    parts = [
        plan.reference.sha256, plan.recipe.model_dump(mode="json"), [one.model_dump() for one in candidates],
        prepared.calibration.record.sha256, prepared.scored.record.sha256, seed, str(device), torch.__version__,
        __version__,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _halves(text: TokenText, tokens: int) -> tuple[TokenText, TokenText]:
    """The sequences that candidates are made on and, of `tokens` tokens, those that they are scored on."""
    length = text.ids.shape[1]
    count = max(LEAST_SEQUENCES, -(-tokens // length))
    if len(text.ids) < 2 * count:
        raise ConfigError(
            f"--tokens {tokens}: {count} sequences of {length} tokens are scored and as many again are what "
            f"candidates are made on, and the calibration text has {len(text.ids)}; give more text or fewer tokens"
        )
    return _part(text, slice(count)), _part(text, slice(count, 2 * count))


def _part(text: TokenText, rows: slice) -> TokenText:
    ids = text.ids[rows]
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    record = text.record.model_copy(update={"num_samples": len(ids), "tokens": ids.numel(), "sha256": digest})
    return TokenText(ids, text.domains[rows], record)


def _opened(plan: Plan, directory: Path) -> Base:
    """The weights; a GGUF file's are unpacked into the directory first."""
    stored = stored_weights(plan)
    if isinstance(stored, WeightFiles):
        return base_of(plan, stored)
    stored.unpack(directory / "base")
    return base_of(plan, WeightFiles(directory / "base", unpacked_from=stored.files))


def _other_bytes(prepared: Prepared, base: Base) -> int:
    """Bytes of all tensors that no decision is about."""
    plan = prepared.plan
    decided = sum(stored_bytes(plan, one, None) for one in prepared.decisions)
    return tensor_bytes(replace(plan, modules={}), base.carried_bytes) - decided


def _records(prepared: Prepared, candidates: Sequence[Candidate], state: State) -> Iterator[DecisionRecord]:
    plan = prepared.plan
    for one in prepared.decisions:
        felt = state.scores.get(one.name)
        if not felt:  # a layer that reads another's cache
            continue
        choices: dict[str, Choice] = {}
        if one.kind == CACHE:
            choices[FP8_CACHE] = _choice(state.cached[one.name], FP8_BITS, felt[FP8_CACHE])
        for candidate in () if one.kind == CACHE else candidates:
            if candidate.scheme == NONE:
                choices[candidate.name] = _choice(
                    stored_bytes(plan, one, None), 8 * plan.dtype.itemsize, None
                )
            elif candidate.name in felt:
                entry = prepared.tables[candidate.name][one.linears[0]]
                choices[candidate.name] = _choice(
                    stored_bytes(plan, one, entry), entry.scheme.bits, felt[candidate.name]
                )
        modules = tuple(plan.names.published(name) for name in one.linears)
        yield DecisionRecord(
            name=one.name, layer=one.layer, kind=one.kind, modules=modules, weights=weights_of(plan, one),
            choices=choices,
        )  # fmt: skip


def _choice(size: int, bits: float, nats: Tensor | None) -> Choice:
    """Of nats of each token, (sequences, tokens); None where nothing changes."""
    if nats is None:
        return Choice(bytes=size, bits=bits, kl=0.0, kl_stderr=0.0)
    return Choice(bytes=size, bits=bits, kl=float(nats.mean()), kl_stderr=clustered_stderr(nats))
