"""A causal language model that is run layer by layer; only one layer's weights are in memory.

The model exists as a skeleton without weights; what every layer is called with (mask, positions, rotary embeddings) is
captured once for each sequence length by running the skeleton with recorders in place of its layers. Where layers are
called with more than that, hidden states share their rows with it (carried.py).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowbit_core.errors import NumericsError
from lowbit_quantize.device import ranks
from lowbit_quantize.model.architecture import Architecture, kind_of
from lowbit_quantize.model.experts.visited import VisitedExperts
from lowbit_quantize.model.files.kept_types import KeptTypes
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.model.hooks import HookedCache, InputObservers, KVCacheHook, SeenAll, inputs_of
from lowbit_quantize.model.skeleton import is_tied, text_config
from lowbit_quantize.model.streams.carried import Call, Carried
from lowbit_quantize.model.streams.form import LeftTensor, left_tensors
from lowbit_quantize.model.streams.stand_in import Arguments, StandIn
from lowbit_quantize.model.streams.surroundings import Surroundings
from lowbit_quantize.model.tape import Tape, tell
from lowbit_quantize.model.weights import is_finite

BATCH_TOKENS = 2048  # tokens in a forward pass: enough for efficient products, few enough for the caches

CACHE = "past_key_values"
OURS, BASE = "ours", "base"  # whose observers are told
LENGTHS = 7, 9  # of two texts that show what layers leave for others
END = ""  # of a layer, where the name of a module says how far hidden states go


class Weights(Protocol):
    """Where tensors are read from, by the model's names for them."""

    @property
    def read_files(self) -> set[str]:
        """Names of the files that were read so far."""

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored or dequantized."""


def read_as(weights: Weights, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One tensor in another type; raises NumericsError where that type cannot hold it."""
    stored = weights.read(name)
    if stored.dtype == dtype:
        return stored.to(device)
    cast = stored.to(device, dtype)
    if not is_finite(cast):
        raise NumericsError(
            f"{name} holds {float(stored.abs().max()):.3g}, which is too large for {dtype}, in which the base "
            "computes; give --dtype bfloat16 --overwrite"
        )
    return cast


@dataclass(frozen=True)
class BasePass:
    """The base model's side of an observation; `advance` moves its hidden states on: to a module's input, or `END`."""

    layer: nn.Module
    hidden: Tensor
    observers: InputObservers
    advance: str | None


class Decoder:
    """A causal language model whose weights are read from disk as the walk needs them."""

    def __init__(
        self,
        config: Any,
        architecture: Architecture,
        weights: Weights,
        device: torch.device,
        skeleton: nn.Module,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.config, self.architecture, self.weights = text_config(config), architecture, weights
        self.device, self.dtype, self.skeleton = device, dtype, skeleton
        self.names = PublishedNames(skeleton)
        self.kept_types = KeptTypes(skeleton, self.names)
        self._layers: nn.ModuleList = self.skeleton.get_submodule(architecture.layers)  # type: ignore[assignment]
        self._arguments: dict[tuple[int, int, torch.dtype], list[Arguments]] = {}
        self._plain = architecture.stream.plain
        self._carried = Carried(
            architecture.stream, self.config.hidden_size, self._surroundings, self._left_tensors
        )

    @property
    def depth(self) -> int:
        return len(self._layers)

    @cached_property
    def width(self) -> int:
        """Numbers of each token that walk: the last size of a stream."""
        return self._carried.rows.width

    def layer_name(self, index: int) -> str:
        return f"{self.architecture.layers}.{index}"

    def layer(self, index: int) -> nn.Module:
        """Layer `index` of the skeleton, without weights."""
        return self._layers[index]

    def load_layer(self, index: int) -> nn.Module:
        """Layer `index` with its weights, in the compute dtype but for what keeps its own."""
        return self.load_into(copy.deepcopy(self._layers[index]), index)

    def load_frame(self, index: int) -> nn.Module:
        """Layer `index` with its weights but for its routed experts, which are made when they are asked for."""
        layer = copy.deepcopy(self._layers[index])
        if experts := kind_of(layer).experts:
            there: Any = layer.get_submodule(experts)

            def make(number: int) -> nn.Module:
                return self.load_part(index, f"{experts}.{number}")

            layer.set_submodule(experts, VisitedExperts(make, there[0], range(len(there))))
        return self.load_into(layer, index)

    def load_into(self, layer: nn.Module, index: int) -> nn.Module:
        """Give a layer, which may lack parts of layer `index`, its weights."""
        return self._load(layer, self.layer_name(index))

    def load_part(self, index: int, name: str) -> nn.Module:
        """A module of layer `index` with its weights."""
        return self._load_named(f"{self.layer_name(index)}.{name}")

    def embed(self, token_ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """A stream before the first layer, (sequences, tokens, width), in `hidden` where it is given."""
        if hidden is None:
            hidden = torch.empty(*token_ids.shape, self.width, dtype=self.dtype, device=self.device)
        if not self._plain:
            for batch in batches_of(hidden):
                hidden[batch] = self._carried.first(token_ids[batch].to(self.device), hidden.dtype)
            return hidden
        embedding, factor = self._load_named(self.architecture.embedding), self.architecture.embedding_factor
        for row, ids in zip(hidden, token_ids.to(self.device), strict=True):
            embedded = embedding(ids)
            row.copy_(embedded if factor == 1 else embedded * factor)
        return hidden

    def finished(self, stream: Tensor) -> Tensor:
        """What the final norm reads, (sequences, tokens, hidden), of a stream behind the last layer."""
        if self._plain:
            return stream
        parts = [self._carried.finished(stream[batch].to(self.device)) for batch in batches_of(stream)]
        return torch.cat(parts)

    def head(self) -> tuple[nn.Module, Tensor]:
        """The final norm and the output matrix, (vocabulary, hidden): the embedding's where they are tied."""
        tied = is_tied(self.skeleton, self.architecture)
        matrix = self.read(f"{self.architecture.embedding if tied else self.architecture.head}.weight")
        return self._load_named(self.architecture.final_norm), matrix

    def run_layer(
        self, layer: nn.Module, index: int, hidden: Tensor, hook: KVCacheHook | None = None
    ) -> Iterator[Tensor]:
        """Run one layer over (sequences, tokens, hidden) in batches; yields each batch's output in order."""
        for batch in batches_of(hidden):
            given, args, kwargs = self.call(index, hidden[batch])
            with torch.no_grad():
                output = layer(given, *args, **kwargs, **_cache(layer, hook))
            yield self._behind(hidden[batch], output[0] if isinstance(output, tuple) else output, kwargs)

    def observe(
        self,
        layer: nn.Module,
        index: int,
        hidden: Tensor,
        observers: InputObservers,
        hook: KVCacheHook | None,
        *,
        stop: bool,
        base: BasePass | None = None,
    ) -> None:
        """Run a layer for what its observers and the KV-cache hook see; with `stop` no further than to the last one.

        Each batch of the base model's hidden states, where they are given, goes first.
        """
        batches = batches_of(hidden)
        if ranks.count() == 1:
            for batch in batches:
                self._observe_batch(layer, index, hidden, batch, observers, hook, stop=stop, base=base)
            return
        told = {OURS: observers, BASE: base.observers if base else {}}
        for first in range(0, len(batches), ranks.count()):
            together, tape = batches[first : first + ranks.count()], Tape()
            moved: Tensor | None = None
            for batch in ranks.own(together):
                side = base and replace(base, observers=tape.observers(BASE, list(base.observers)))
                noting = tape.observers(OURS, list(observers))
                self._observe_batch(
                    layer, index, hidden, batch, noting, tape.hook(hook), stop=stop, base=side, tape=tape
                )
                moved = base.hidden[batch] if base and base.advance is not None else None
            for source, batch in enumerate(together):
                notes, there = ranks.exchange((tape.notes, moved), source, self.device)
                tell(notes, told, hook)
                if there is not None and base is not None:
                    base.hidden[batch] = there

    def _observe_batch(
        self,
        layer: nn.Module,
        index: int,
        hidden: Tensor,
        batch: slice,
        observers: InputObservers,
        hook: KVCacheHook | None,
        *,
        stop: bool,
        base: BasePass | None,
        tape: Tape | None = None,
    ) -> None:
        moved = None
        with ranks.alone():
            if base is not None and base.advance:
                self.advance_to(base.advance, base.layer, index, base.hidden[batch], None, base.observers)
            elif base is not None:
                with inputs_of(base.layer, base.observers, stop=base.advance is None), suppress(SeenAll):
                    moved = next(self.run_layer(base.layer, index, base.hidden[batch]))
        given, args, kwargs = self.call(index, hidden[batch])
        watched = tape.attention() if tape else nullcontext()
        with inputs_of(layer, observers, stop=stop), torch.no_grad(), suppress(SeenAll), watched:
            layer(given, *args, **kwargs, **_cache(layer, hook))
        if base is not None and moved is not None:  # only now: observers may hold what the layer was given
            base.hidden[batch] = moved

    def advance(self, layer: nn.Module, index: int, hidden: Tensor, hook: KVCacheHook | None = None) -> None:
        """Replace `hidden` by the layer's output, in place."""

        def output(batch: slice) -> Tensor:
            return next(self.run_layer(layer, index, hidden[batch], hook))

        self.replace_dealt(hidden, output)

    def replace_dealt(self, hidden: Tensor, output: Callable[[slice], Tensor]) -> None:
        """Replace each batch of `hidden`, in place, by what one of the ranks makes of it."""
        batches = batches_of(hidden)
        for first in range(0, len(batches), ranks.count()):
            together = batches[first : first + ranks.count()]
            dealt = ranks.own(together)
            with ranks.alone():
                mine = [output(batch) for batch in dealt]
            for batch, made in zip(together, ranks.in_order(mine, self.device), strict=True):
                hidden[batch] = made

    def advance_to(
        self,
        module: str,
        layer: nn.Module,
        index: int,
        hidden: Tensor,
        hook: KVCacheHook | None = None,
        observers: InputObservers | None = None,
    ) -> None:
        """Replace `hidden` by what a module of the layer reads, in place; the rest of the layer does not run.

        `observers` see one batch, of which no other rank knows.
        """

        def output(batch: slice) -> Tensor:
            read: list[Tensor] = []
            given, args, kwargs = self.call(index, hidden[batch])
            seen = inputs_of(layer, {**(observers or {}), module: read.append}, stop=True)
            with seen, suppress(SeenAll), torch.no_grad():
                layer(given, *args, **kwargs, **_cache(layer, hook))
            return self._behind(hidden[batch], read[0].view_as(given), kwargs)

        self.replace_dealt(hidden, output)

    def call(self, index: int, rows: Tensor) -> Call:
        """What a layer is called with for these rows of a stream."""
        key = 1 if self._plain else len(rows), rows.shape[1], rows.dtype
        if key not in self._arguments:
            self._arguments[key] = self._capture(*key)
        rows, arguments = rows.to(self.device), self._arguments[key][index]
        return (rows, *arguments) if self._plain else self._carried.call(index, rows, arguments)

    def _behind(self, rows: Tensor, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The same rows of a stream with other hidden states."""
        return hidden if self._plain else self._carried.after(rows, hidden, kwargs)

    def _capture(self, sequences: int, tokens: int, dtype: torch.dtype) -> list[Arguments]:
        """What each layer is called with, beside hidden states, on texts of so many tokens."""
        if not self._plain:
            ids = torch.zeros(sequences, tokens, dtype=torch.int64, device=self.device)
            return [_without_cache(called) for called in self._carried.around(dtype).calls(ids)[1]]
        recorders = nn.ModuleList(StandIn(layer, kind_of(layer).outputs) for layer in self._layers)
        parent_name, _, leaf = self.architecture.layers.rpartition(".")
        parent = self.skeleton.get_submodule(parent_name)
        embeds = torch.zeros(
            sequences, tokens, self.config.get_text_config().hidden_size, dtype=dtype, device=self.device
        )
        setattr(parent, leaf, recorders)
        norm = self.skeleton.get_submodule(self.architecture.final_norm)
        try:
            self._replace(self.architecture.final_norm, nn.Identity())
            _move_buffers(parent, self.device)
            with torch.no_grad():
                parent(inputs_embeds=embeds, use_cache=False)
        finally:
            setattr(parent, leaf, self._layers)
            self._replace(self.architecture.final_norm, norm)
        return [_without_cache(recorder.called) for recorder in recorders]  # type: ignore[arg-type]

    def _surroundings(self, dtype: torch.dtype) -> Surroundings:
        outputs = [kind_of(layer).outputs for layer in self._layers]
        names = self.architecture.layers, self.architecture.final_norm
        return Surroundings(self.skeleton, *names, outputs, self.read, dtype)

    def _left_tensors(self) -> list[LeftTensor]:
        """What layers leave for later ones, seen by running those that do on two short texts."""
        name, found = self.architecture.stream.left, []
        for index, kind in enumerate(self.architecture.kinds):
            if not kind.leaves:
                continue
            layer, seen = self.load_frame(index), []
            for tokens in LENGTHS:
                ids = torch.zeros(1, tokens, dtype=torch.int64, device=self.device)
                hidden, calls = self._carried.around(self.dtype).calls(ids)
                args, kwargs = _without_cache(calls[index])
                left = type(kwargs[name])()
                with torch.no_grad():
                    layer(hidden, *args, **(kwargs | {name: left}), **_cache(layer, None))
                seen.append(left)
            found += [one for key in seen[0] for one in left_tensors(key, seen[0][key], seen[1][key])]
        return found

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.skeleton.get_submodule(parent), leaf, module)

    def _load_named(self, name: str) -> nn.Module:
        return self._load(copy.deepcopy(self.skeleton.get_submodule(name)), name)

    def _load(self, module: nn.Module, prefix: str) -> nn.Module:
        state = {name: self.read(f"{prefix}.{name}") for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)

    def read(self, name: str) -> Tensor:
        """One tensor of the model, in the compute dtype or the one that it keeps."""
        return read_as(self.weights, name, self.kept_types.dtype(name, self.dtype), self.device)


def batches_of(hidden: Tensor) -> list[slice]:
    """The sequences of hidden states, (sequences, tokens, hidden), that go through a layer at once."""
    size = max(1, BATCH_TOKENS // hidden.shape[1])
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


def _without_cache(called: Arguments) -> Arguments:
    args, kwargs = called
    return args, {name: value for name, value in kwargs.items() if name != CACHE}


def _cache(layer: nn.Module, hook: KVCacheHook | None) -> dict[str, HookedCache | None]:
    """The cache that a layer is called with: only attention has one that a hook can look into."""
    return {CACHE: HookedCache(hook) if hook and kind_of(layer).attention else None}


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """What a model computes by itself, outside of its layers, where its text is: tables of positions, say."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
