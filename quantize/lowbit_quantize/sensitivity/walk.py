"""The walk forward and back: what every layer reads is kept, then the loss's gradient comes back layer by layer.

Two texts walk. On one, candidates are made, as a run makes them; on the other, which they have not seen, their errors
are felt: GPTQ errs several times less on its own text. A decision d that adds δ_t to what its linears give for token t,
whose gradients are g_t, is predicted to cost ½ Σ_t (g_t · δ_t)² nats, summed over all the linears of d first. What
errors of different tokens have to do with each other is left out: a single sample of it for each sequence is too few.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit_core.log import get_logger
from lowbit_core.progress import track
from lowbit_quantize.device.memory import return_freed_memory
from lowbit_quantize.model.architecture import LayerKind, LinearGroup, kind_of
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.experts.visited import RoutedCall
from lowbit_quantize.quality.kl import compare
from lowbit_quantize.run.hidden_states import HiddenStates
from lowbit_quantize.schemes.kv_cache import calibrated_scales
from lowbit_quantize.sensitivity.changes import FeltGroup, expert_statistics
from lowbit_quantize.sensitivity.decisions import Decision
from lowbit_quantize.sensitivity.gradients import SeenLayer, backward, backward_dtype, sampled_loss_gradient
from lowbit_quantize.sensitivity.progress import Progress, Scores, State
from lowbit_quantize.sensitivity.report import CACHE, FP8_CACHE, HEAD
from lowbit_quantize.statistics.attention import attention_seen_by
from lowbit_quantize.statistics.kv_absmax import KVAbsmax
from lowbit_quantize.statistics.layer import LayerStatistics
from lowbit_quantize.walk.head import quantize_head
from lowbit_quantize.walk.module_plan import Modules
from lowbit_quantize.walk.visit import advance, experts_of

log = get_logger("quantize")


@dataclass(frozen=True)
class Observed:
    """What a layer's candidates are made of; `prefix` is what names of its linears begin with in the model."""

    prefix: str
    statistics: LayerStatistics
    calls: RoutedCall | None
    absmax: KVAbsmax


class SensitivityWalk:
    """One model, the decisions about it, and the table that each candidate would make of it."""

    def __init__(
        self,
        decoder: Decoder,
        decisions: Sequence[Decision],
        tables: Mapping[str, Modules],
        texts: tuple[Tensor, Tensor],
        streams: HiddenStates,
        progress: Progress,
        seed: int,
    ) -> None:
        """`texts` are token ids to make candidates on and to score, (sequences, tokens) each, of one length."""
        self._decoder, self._decisions, self._tables = decoder, decisions, tables
        self._ids, self._made_on, self._shape = torch.cat(texts), len(texts[0]), texts[1].shape
        self._streams, self._progress = streams, progress
        self._generator = torch.Generator(decoder.device).manual_seed(seed)
        self._scores: Scores = {}
        self._cached: dict[str, int] = {}

    def run(self) -> State:
        """Score every decision and candidate, token by token."""
        decoder = self._decoder
        hidden = self._forward()
        state = self._progress.load()
        if state is None:
            state = State(decoder.depth - 1, self._loss_gradient(hidden), self._generator.get_state())
        else:
            log.info("going on with layer %d of %d, backward", state.next_layer, decoder.depth)
            self._scores, self._cached = state.scores, state.cached
            self._generator.set_state(state.generator)
        del hidden
        gradient = state.gradient.to(decoder.device)
        done = decoder.depth - 1 - state.next_layer
        layers = reversed(range(state.next_layer + 1))
        for index in track(layers, decoder.depth, "layers backward", done=done):
            self._score_layer(index, gradient)
            self._streams.release()
            return_freed_memory()
            state = State(index - 1, gradient, self._generator.get_state(), self._scores, self._cached)
            self._progress.save(state)
        return state

    def _loss_gradient(self, hidden: Tensor) -> Tensor:
        """By what the last layer gives for the scored text; the head is scored on the way."""
        decoder = self._decoder
        norm, head = decoder.head()
        states = decoder.finished(hidden)
        self._score_head(norm, head, states)
        scored = states[self._made_on :]
        form = decoder.architecture.logits
        found = sampled_loss_gradient(scored.flatten(0, 1), norm, head, form, self._generator)
        return found.view(scored.shape)

    def _forward(self) -> Tensor:
        """Keep what every layer reads; returns what the last one gives."""
        decoder = self._decoder
        hidden = decoder.embed(self._ids)
        for index in track(range(decoder.depth), decoder.depth, "layers forward"):
            self._streams.new(f"layer-{index}", tuple(hidden.shape), decoder.dtype).copy_(hidden)
            advance(decoder, decoder.load_frame(index), index, hidden)
            self._streams.release()
        return hidden

    def _score_layer(self, index: int, gradient: Tensor) -> None:
        decoder = self._decoder
        kept = self._streams[f"layer-{index}"]
        here = [one for one in self._decisions if one.layer == index]
        prefix = f"{decoder.layer_name(index)}."
        linears = [name.removeprefix(prefix) for one in here for name in one.linears]
        layer = decoder.load_layer(index)
        cache = any(one.kind == CACHE for one in here)
        seen_of = self._observed(layer, index, kept[: self._made_on], linears)
        if backward_dtype(decoder) != decoder.dtype:
            layer.float()
        seen = backward(decoder, layer, index, kept[self._made_on :], gradient, linears, cache=cache)
        for one in here:
            if one.kind == CACHE:
                self._score_cache(one, seen_of.absmax, seen)
            else:
                self._score_linears(one, layer, seen_of, seen)

    def _observed(self, layer: nn.Module, index: int, hidden: Tensor, linears: Sequence[str]) -> Observed:
        """Run the calibration text through a layer; experts are silent, and what they are called with is kept."""
        decoder, kind, prefix = self._decoder, kind_of(layer), f"{self._decoder.layer_name(index)}."
        frame = decoder.load_frame(index) if kind.experts else layer
        groups = _groups(decoder, layer, linears)
        dense = [group for group in groups if not kind.is_expert(group)]
        entering = [group for group in groups if kind.is_expert(group) and group.enters]
        statistics = LayerStatistics(
            frame, decoder.architecture, decoder.device, dense,
            sampled=self._sampled(prefix, groups), entering=entering,
        )  # fmt: skip
        absmax, calls = KVAbsmax(), list[RoutedCall]()
        recording = experts_of(frame).recording() if kind.experts else nullcontext(calls)
        with (
            attention_seen_by(statistics.attended, stop=statistics.ends_before_attention),
            recording as calls,
        ):
            decoder.observe(frame, index, hidden, statistics.observers, absmax, stop=not kind.experts)
        if entering:
            statistics.finish_block()
        parts = zip(*((one.hidden, one.chosen, one.gates) for one in calls), strict=True)
        return Observed(prefix, statistics, RoutedCall(*map(torch.cat, parts)) if calls else None, absmax)

    def _sampled(self, prefix: str, groups: Sequence[LinearGroup]) -> set[str]:
        return {
            group.linears[0]
            for group in groups
            for table in self._tables.values()
            if table[f"{prefix}{group.linears[0]}"].samples_inputs
        }

    def _score_linears(
        self, decision: Decision, layer: nn.Module, observed: Observed, seen: SeenLayer
    ) -> None:
        tokens, prefix = self._shape.numel(), observed.prefix
        totals = {name: torch.zeros(tokens, device=self._decoder.device) for name in self._tables}
        names = [name.removeprefix(prefix) for name in decision.linears]
        for number, groups in _by_expert(_groups(self._decoder, layer, names), kind_of(layer)).items():
            statistics = observed.statistics
            if number is not None:
                statistics = self._of_expert(layer, groups, observed, number)
            for group in groups:
                if group.linears[0] not in seen.linears:  # an expert that no scored token goes through
                    continue
                felt = FeltGroup(
                    layer, group, [seen.linears[name] for name in group.linears], self._generator
                )
                for name, table in self._tables.items():
                    change = felt.change(table[f"{prefix}{group.linears[0]}"], statistics)
                    totals[name] += felt.scores(change, tokens)
        self._keep(decision, totals)

    def _of_expert(
        self, layer: nn.Module, groups: Sequence[LinearGroup], observed: Observed, number: int
    ) -> LayerStatistics:
        assert observed.calls is not None
        statistics = LayerStatistics(
            layer, self._decoder.architecture, self._decoder.device, groups,
            sampled=self._sampled(observed.prefix, groups), block=observed.statistics,
        )  # fmt: skip
        expert = layer.get_submodule(f"{kind_of(layer).experts}.{number}")
        return expert_statistics(groups, observed.calls, number, statistics, expert)

    def _score_cache(self, decision: Decision, absmax: KVAbsmax, seen: SeenLayer) -> None:
        """Keys and values in FP8 by the scales that a run would choose."""
        if not absmax.cached or not seen.keys:
            return
        scales = calibrated_scales((absmax.key, absmax.value), (absmax.key_sample, absmax.value_sample), None)
        parts = []
        for (keys, by_keys), (values, by_values) in zip(seen.keys, seen.values, strict=True):
            rounded = scales(keys, values)
            felt = ((rounded[0] - keys).float() * by_keys).sum((1, 3))
            parts.append((felt + ((rounded[1] - values).float() * by_values).sum((1, 3))).flatten())
        self._cached[decision.name] = sum(
            pair[0][0].shape[1] * pair[0][0].shape[3] for pair in (seen.keys, seen.values)
        )
        self._keep(decision, {FP8_CACHE: torch.cat(parts)})

    def _score_head(self, norm: nn.Module, head: Tensor, states: Tensor) -> None:
        """The head's KL is computed as it is, not predicted: the logits are there."""
        decoder, name = self._decoder, self._decoder.architecture.head
        if not any(one.kind == HEAD for one in self._decisions):
            return
        made_on, scored = states[: self._made_on], states[self._made_on :]
        ids, offset = self._ids[self._made_on :], decoder.architecture.final_norm_offset
        found = {}
        for candidate, table in self._tables.items():
            if name in table:
                ours = quantize_head(norm, head, table[name], made_on, offset, fold=False).weight
                form = decoder.architecture.logits
                found[candidate] = compare(scored, scored, norm, norm, head, ids, ours, form).kld
        self._scores[HEAD] = found

    def _keep(self, decision: Decision, felt: Mapping[str, Tensor]) -> None:
        """Nats of each token."""
        self._scores[decision.name] = {
            name: one.cpu().double().square().div(2).view(self._shape) for name, one in felt.items()
        }


def _groups(decoder: Decoder, layer: nn.Module, linears: Sequence[str]) -> list[LinearGroup]:
    """The groups of a layer that these linears are."""
    wanted = set(linears)
    return [group for group in decoder.architecture.groups_of(layer) if group.linears[0] in wanted]


def _by_expert(groups: Sequence[LinearGroup], kind: LayerKind) -> dict[int | None, list[LinearGroup]]:
    """The groups of each routed expert, by its number, and all others."""
    found: dict[int | None, list[LinearGroup]] = {}
    for group in groups:
        number = None
        if kind.is_expert(group):
            number = int(group.linears[0].removeprefix(f"{kind.experts}.").partition(".")[0])
        found.setdefault(number, []).append(group)
    return found
