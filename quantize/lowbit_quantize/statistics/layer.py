"""Statistics of one layer, gathered in one pass: Hessians, and how far its inputs are from the base model's."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lowbit_quantize.model.architecture import Architecture, LinearGroup, kind_of, linear_of
from lowbit_quantize.statistics.error_compensation import Drift
from lowbit_quantize.statistics.hessian import AttendedHessian, Hessian
from lowbit_quantize.statistics.input_sample import InputSample
from lowbit_quantize.statistics.sample import Sample

Observers = dict[str, Callable[[Tensor], None]]

BORROWED_TOKENS = 2048  # of a block's inputs that are kept for experts that see too few of their own


class LayerStatistics:
    """What one pass over the calibration tokens saw of a decoder layer, for each of some groups of linears.

    An expert's linears are observed on the tokens that the block routes to it. One that sees fewer tokens than its
    linear has inputs borrows the rest from its layer: its Hessian shrinks towards the one that it would have
    if every token of the block were its own.
    """

    def __init__(
        self,
        layer: nn.Module,
        architecture: Architecture,
        device: torch.device,
        groups: Sequence[LinearGroup] | None = None,
        paired: Mapping[str, Tensor | None] | None = None,
        sampled: Collection[str] = (),
        block: "LayerStatistics | None" = None,
        entering: Sequence[LinearGroup] = (),
        base: nn.Module | None = None,
    ) -> None:
        """Observe `groups`, by default all of the layer.

        `paired` names the first linears of groups whose inputs are observed in the base model too, and what the
        compressed model's inputs of each are divided by, (features,), if by anything; `base` is the layer as the base
        model has it, for linears that read fewer inputs than there; `sampled` those whose inputs are
        kept in part, as they are. `entering` are experts' groups that read what all are called with: that is observed
        for all of them; `block` has observed it before, where `groups` are one expert's.
        """
        self._layer, self._architecture = layer, architecture
        self._hessians: dict[str, Hessian] = {}
        self._drifts: dict[str, Drift] = {}  # by the name of a group's first linear
        self._residuals: dict[str, Drift] = {}  # by the name of the norm that reads the residual stream
        self._samples: dict[str, InputSample] = {}  # by where they are taken
        self._block_inputs: Sample = block._block_inputs if block else Sample(BORROWED_TOKENS)
        self._routes = False
        self._block_seen: dict[str, Hessian] = {} if block is None else block._hessians
        for group in architecture.groups_of(layer) if groups is None else groups:
            self._routes = self._routes or self._architecture.is_expert(group)
            features = linear_of(layer, group.linears[0]).in_features
            kind = AttendedHessian if group.attended else Hessian
            for name in self._places(group):
                self._hessians[name] = self._block_seen.get(name) or kind(features, device)
            if group.linears[0] in sampled:
                for name in self._places(group):
                    self._samples.setdefault(name, InputSample(features, device))
            if paired and group.linears[0] in paired:
                drift = self._drifts[group.linears[0]] = self._drift(group, paired[group.linears[0]], base)
                if group.residual:
                    self._residuals[group.residual] = drift
        if entering:
            self._observe_block(entering, sampled, device)

    def _drift(self, group: LinearGroup, divisor: Tensor | None, base: nn.Module | None) -> Drift:
        linears = [linear_of(self._layer, name) for name in group.linears]
        wider = linear_of(base, group.linears[0]) if base is not None else None
        if wider is None or wider.in_features == linears[0].in_features:
            wider = None
        return Drift(
            [one.weight for one in linears], divisor, group.attended, bool(group.residual),
            wider, linears[0].bias if wider is not None else None,
        )  # fmt: skip

    def _observe_block(
        self, entering: Sequence[LinearGroup], sampled: Collection[str], device: torch.device
    ) -> None:
        self._routes = True
        features = linear_of(self._layer, entering[0].linears[0]).in_features
        self._hessians.setdefault(self._entrance, Hessian(features, device))
        if any(group.linears[0] in sampled for group in entering):
            self._samples.setdefault(self._entrance, InputSample(features, device))

    def finish_block(self) -> None:
        """What all experts read has been seen: each of them may ask for it by itself now."""
        self._hessians[self._entrance].matrix()

    def divide_block(self, scale: Tensor) -> None:
        """Take a scale that was folded into what the routed experts read since it was observed, (features,)."""
        self._hessians[self._entrance].divide(scale)
        self._block_inputs.divide(scale)

    @property
    def observers(self) -> Observers:
        """What to call with the input of each observed module of the layer, in the compressed model."""
        observers: Observers = {name: drift.see_residual for name, drift in self._residuals.items()}
        observers.update({name: seen.add for name, seen in self._hessians.items()})
        for name, sample in self._samples.items():
            observers[name] = both(observers[name], sample.add)
        for name, drift in self._drifts.items():
            observers[name] = both(observers[name], drift.add)
        if self._routes:
            entrance, take = self._entrance, self._block_inputs.add
            observers[entrance] = both(observers[entrance], take) if entrance in observers else take
        elif self.attended:  # the attention is known before this is reached
            observers.setdefault(kind_of(self._layer).attention_end, _ignore)
        return observers

    @property
    def ends_before_attention(self) -> bool:
        """Whether nothing is observed beyond what attention is computed from."""
        return self.observers.get(kind_of(self._layer).attention_end) is _ignore

    @property
    def routes(self) -> bool:
        """Whether routed experts are observed, which may be called in any order."""
        return self._routes

    @property
    def base_observers(self) -> Observers:
        """What to call with the same modules' inputs in the base model, batch by batch, before `observers`."""
        observers: Observers = {name: drift.expect_residual for name, drift in self._residuals.items()}
        observers.update({name: drift.expect for name, drift in self._drifts.items()})
        return observers

    @property
    def attended(self) -> list[AttendedHessian | Drift]:
        """The statistics whose tokens count by the attention they receive."""
        drifts = [drift for drift in self._drifts.values() if drift.attended]
        seen = [seen for seen in self._hessians.values() if isinstance(seen, AttendedHessian)]
        return [*seen, *drifts]

    def target(self, group: LinearGroup, weight: Tensor, hessian: Tensor) -> Tensor:
        """What to round a group's stacked weight, (out, in), towards."""
        drift = self._drifts.get(group.linears[0])
        return weight if drift is None else drift.target(weight, hessian)

    @property
    def under_calibrated(self) -> dict[int, int]:
        """Tokens that were seen by each expert that borrows, by its number."""
        prefix = f"{self._architecture.experts}."
        places = {name: seen for name, seen in self._hessians.items() if name.startswith(prefix)}
        return {
            int(name.removeprefix(prefix).partition(".")[0]): seen.tokens
            for name, seen in places.items()
            if seen.tokens < seen.features
        }

    def hessian(self, group: LinearGroup) -> Tensor:
        """H of a group's input, (in, in)."""
        seen = self._hessians[self._place(group)]
        if not self._architecture.is_expert(group) or seen.tokens >= seen.features:
            return seen.matrix()
        own = seen.tokens / seen.features
        return own * seen.matrix() + (1 - own) * self._borrowed(group)

    def sample(self, group: LinearGroup) -> InputSample | None:
        """Some of a group's inputs, where they are kept; an expert that borrows for its Hessian does for them too."""
        kept, seen = self._samples.get(self._place(group)), self._hessians[self._place(group)]
        if kept is None or not self._architecture.is_expert(group) or seen.tokens >= seen.features:
            return kept
        return kept.with_more(self._block_rows(group))

    def joint_sample(self, groups: Sequence[LinearGroup]) -> InputSample | None:
        """Some of what all these groups read, where it is kept."""
        if self._architecture.is_expert(groups[0]):
            return self._samples.get(self._entrance)
        return self.sample(groups[0])

    def joint_hessian(self, groups: Sequence[LinearGroup]) -> Tensor:
        """H of the activation that all these groups read: for experts, every token of the block."""
        if self._architecture.is_expert(groups[0]):
            return self._hessians[self._entrance].matrix()
        return self.hessian(groups[0])

    def _borrowed(self, group: LinearGroup) -> Tensor:
        if group.enters:
            return self._hessians[self._entrance].matrix()
        seen = Hessian(linear_of(self._layer, group.linears[0]).in_features, self._block_inputs.device)
        seen.add(self._block_rows(group))
        return seen.matrix()

    def _block_rows(self, group: LinearGroup) -> Tensor:
        """What an expert's linears would read of the block's tokens that are kept, (tokens, features)."""
        rows = self._block_inputs.rows()
        if group.enters:
            return rows
        expert = self._layer.get_submodule(group.linears[0].rpartition(".")[0])
        dtype = linear_of(self._layer, group.linears[0]).weight.dtype  # a router may read them in float32
        with torch.no_grad():
            found: Tensor = expert.middle(rows.to(dtype))  # type: ignore[operator]
        return found

    @property
    def _entrance(self) -> str:
        """Whose input is what all routed experts are called with."""
        return kind_of(self._layer).entrance

    def _places(self, group: LinearGroup) -> list[str]:
        """Whose inputs are observed for a group; for experts, what all are called with as well."""
        return list(dict.fromkeys([self._place(group), *[self._entrance] * group.enters]))

    def _place(self, group: LinearGroup) -> str:
        """Whose input is observed for a group: its first linear's, or the router's where that is the same."""
        return (
            group.other_readers[0]
            if group.other_readers and not self._architecture.is_expert(group)
            else group.linears[0]
        )


def _ignore(_: Tensor) -> None:
    pass


def both(first: Callable[[Tensor], None], second: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def call(inputs: Tensor) -> None:
        first(inputs)
        second(inputs)

    return call
