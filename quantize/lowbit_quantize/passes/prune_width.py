"""Width: channels of networks and groups of heads, as many in every layer, so that plain engines load the rest.

What a linear reads (a network's last, attention's last) is looked at where it stands: its inputs' Hessian says which of
them the output errs least without, and what the weights that stay must become (structure/surgeon.py). The rows that
made what goes go with it. Attention is cut and made up for before the networks, each as a unit by itself, which
arXiv 2510.14444 found to lose least; all of it on what the compressed layers before really give.

How wide the model becomes its configuration says, in one number for all layers: a model of that is built first, and
whatever it would change that is none of this is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lowbit_core.documents import Section
from lowbit_core.errors import ModelError, RecipeError
from lowbit_quantize.device import ranks
from lowbit_quantize.model.architecture import Architecture, kind_of, linear_of
from lowbit_quantize.model.decoder import BasePass, batches_of
from lowbit_quantize.model.experts.visited import RoutedCall
from lowbit_quantize.model.families import reads_biases, reads_head_dim
from lowbit_quantize.model.resized import OpenModel
from lowbit_quantize.model.skeleton import given
from lowbit_quantize.passes.kind import PlainPass
from lowbit_quantize.statistics.layer import Observers
from lowbit_quantize.structure.criteria import Chosen, Criterion, choose
from lowbit_quantize.structure.moments import Aim, Moments
from lowbit_quantize.structure.slabs import Slab, add_bias, cut, give_biases, slabs_of, take_sizes
from lowbit_quantize.structure.surgeon import columns_of
from lowbit_quantize.walk.layer import LayerContext
from lowbit_quantize.walk.visit import experts_of, silent_experts

NAME = "prune_width"
MULTIPLE = 64  # of channels on each device: what kernels for 4 and 8 bits take, and the usual groups
NETWORKS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")  # how configurations call widths
BIASES, ATTENTION_BIASES = "mlp_bias", "attention_bias"
EXPERTS = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
HOLDS = 0.05  # relative: what bfloat16 moves where nothing but zeros is left out


class PruneWidthOptions(Section):
    """What goes, as a share, or stays, as a count: channels of each network (`mlp_…`), of each routed expert
    (`expert_…`), and key and value heads with their queries (`kv_groups`).

    `biases`: linears that read what becomes narrower get a bias, which makes up for the mean of what goes, where the
    configuration has a key for that. `tensor_parallel` must divide what stays; `seed` is for the criterion `random`.
    """

    mlp_ratio: float | None = Field(default=None, gt=0, lt=1, strict=True)
    mlp_channels: int | None = Field(default=None, ge=1, strict=True)
    expert_ratio: float | None = Field(default=None, gt=0, lt=1, strict=True)
    expert_channels: int | None = Field(default=None, ge=1, strict=True)
    kv_groups: int | None = Field(default=None, ge=1, strict=True)
    criterion: Criterion = "brain-surgeon"
    seed: int = 0
    biases: bool = False
    tensor_parallel: int = Field(default=1, ge=1, strict=True)

    @model_validator(mode="after")
    def _something(self) -> "PruneWidthOptions":
        for one in ("mlp", "expert"):
            if getattr(self, f"{one}_ratio") is not None and getattr(self, f"{one}_channels") is not None:
                raise ValueError(
                    f"give {one}_ratio, the share of channels that goes, or {one}_channels, the count that stays"
                )
        sizes = self.model_dump(
            include={"mlp_ratio", "mlp_channels", "expert_ratio", "expert_channels", "kv_groups"}
        )
        if all(value is None for value in sizes.values()):
            raise ValueError(f"nothing is asked for; give one or more of {', '.join(sizes)}")
        return self


@dataclass(frozen=True)
class PruneWidth(PlainPass):
    """Keys of the configuration with the sizes that they become; once fitted, what is cut out of each layer."""

    changed: Mapping[str, int]
    before: Mapping[str, int]
    recipe: PruneWidthOptions
    heads: tuple[int, int]
    model: str
    slabs: tuple[tuple[Slab, ...], ...] = ()
    served: OpenModel | None = None

    name = NAME
    resizes = True

    def fitted(self, walked: OpenModel, served: OpenModel) -> "PruneWidth":
        """Find what becomes smaller in each layer; raises RecipeError where it is not known how to cut it."""
        found = []
        for layer, smaller in zip(walked.layers, served.layers, strict=True):
            try:
                found.append(slabs_of(layer, smaller, self.heads))
            except RecipeError as error:
                raise RecipeError(
                    f"{NAME}: with {self._said} in the configuration of {self.model} "
                    f"({walked.architecture.model_type}), {error}; leave the pass out"
                ) from None
        if not any(found):
            raise RecipeError(f"{NAME}: {self._said} changes no layer of {self.model}; leave the pass out")
        self._check_all_used(found)
        return replace(self, slabs=tuple(found), served=served)

    def _check_all_used(self, found: list[tuple[Slab, ...]]) -> None:
        """Each option must cut something of its own."""
        every = [slab for slabs in found for slab in slabs]
        asked = {
            "mlp": (
                self.recipe.mlp_ratio or self.recipe.mlp_channels,
                lambda s: not s.attention and not s.routed,
            ),
            "expert": (self.recipe.expert_ratio or self.recipe.expert_channels, lambda s: s.routed),
        }
        for option, (wanted, mine) in asked.items():
            if wanted and not any(map(mine, every)):
                raise RecipeError(
                    f"{NAME}.{option}_…: no layer of {self.model} has what becomes smaller by {self._said}; "
                    "networks are asked for by mlp_…, routed experts by expert_…"
                )

    @property
    def _said(self) -> str:
        return ", ".join(f"{key} = {value}" for key, value in self.changed.items() if key != "head_dim")

    @property
    def needs_base_stream(self) -> bool:
        """Whether what stays makes up for the layers before too."""
        return self.recipe.criterion == "brain-surgeon"

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """What each size of the base was and is."""
        return {key: (self.before[key], self.changed[key]) for key in self.before}

    def configuration(self) -> Mapping[str, Any]:
        return self.changed

    def run(self, layer: nn.Module, context: LayerContext) -> None:
        first = self.slabs.index(self.slabs[context.index]) == context.index
        for number, slab in enumerate(self.slabs[context.index]):
            seed = (self.recipe.seed * len(self.slabs) + context.index) * 8 + number
            if slab.routed:
                error = self._cut_experts(layer, slab, context, seed)
            else:
                error = self._cut(layer, slab, context, seed, check=first)
            context.result.figures[f"{NAME}: error of {slab.reader}"] = error

    def _cut(self, layer: nn.Module, slab: Slab, context: LayerContext, seed: int, *, check: bool) -> float:
        """Cut one reader and its producers; returns the relative error of what the reader gives."""
        assert self.served is not None, "a pass is fitted before the walk"
        give_biases(layer, self.served.layers[context.index], slab)
        reader = linear_of(layer, slab.reader)
        seen = self._seen(layer, slab, context)
        chosen = self._choose(reader, seen, slab, seed)
        if not check:
            self._cut_to(layer, slab, chosen, context)
            return chosen.error
        columns = columns_of(chosen.units, reader.in_features // slab.units)
        zeroed = torch.zeros_like(reader.weight)
        zeroed[:, columns] = chosen.weight.to(zeroed.dtype)
        reader.weight = nn.Parameter(zeroed, requires_grad=False)
        with silent_experts(layer):
            wanted = self._output(layer, context)
            self._cut_to(layer, slab, replace(chosen, bias=None), context)
            given_out = self._output(layer, context)
        self._check_output(given_out, wanted, slab, context)
        if chosen.bias is not None:
            add_bias(linear_of(layer, slab.reader), chosen.bias)
        return chosen.error

    def _seen(self, layer: nn.Module, slab: Slab, context: LayerContext) -> Moments:
        """What a reader reads on the calibration text, and what of the base model's it should make up for."""
        reader, stream = linear_of(layer, slab.reader), context.calibration_base
        if stream is None or not self.needs_base_stream:
            seen = Moments(reader.in_features, reader.weight.device)
            with silent_experts(layer):
                context.decoder.observe(
                    layer, context.index, context.calibration, {slab.reader: seen.add}, None, stop=True
                )
            return seen
        aim, base = Aim(reader.weight), context.base_layer()
        norm = next((one.residual for one in kind_of(layer).groups if slab.reader in one.linears), "")
        ours: Observers = {norm: aim.see_residual} if norm else {}  # the output is added to what that reads
        theirs: Observers = {norm: aim.expect_residual} if norm else {}
        ours[slab.reader], theirs[slab.reader] = aim.add, aim.expect
        with silent_experts(layer, base):
            context.decoder.observe(
                layer, context.index, context.calibration, ours, None,
                stop=True, base=BasePass(base, stream, theirs, None),
            )  # fmt: skip
        return aim

    def _cut_to(self, layer: nn.Module, slab: Slab, chosen: Chosen, context: LayerContext) -> None:
        assert self.served is not None, "a pass is fitted before the walk"
        cut(layer, slab, chosen)
        take_sizes(layer, self.served.layers[context.index])

    def _choose(self, reader: nn.Linear, seen: Moments, slab: Slab, seed: int) -> Chosen:
        return choose(
            reader.weight.float(), seen, slab.units, slab.kept, self.recipe.criterion,
            biased=reader.bias is not None, seed=seed,
        )  # fmt: skip

    def _output(self, layer: nn.Module, context: LayerContext) -> Tensor:
        return next(context.decoder.run_layer(layer, context.index, context.calibration[:1])).float()

    def _check_output(self, found: Tensor, wanted: Tensor, slab: Slab, context: LayerContext) -> None:
        """Raises ModelError where a layer gives something else once its zeros are cut out."""
        power = (wanted - context.calibration[:1].float()).norm().clamp(min=1e-20)
        off = float((found - wanted).norm() / power)
        if not off < HOLDS:
            raise ModelError(
                f"{NAME}: layer {context.index} of {self.model} gives something else once {slab.reader} is cut (off by "
                f"{off:.1g}): its rows do not lie as was thought; leave the pass out, and please report it"
            )

    def _cut_experts(self, layer: nn.Module, slab: Slab, context: LayerContext, seed: int) -> float:
        """Choose for each routed expert by what it is given; it is cut when it is made. The mean relative error."""
        assert self.served is not None
        experts, call = experts_of(layer), _called(layer, context)
        found: list[Chosen] = []
        with torch.no_grad(), ranks.alone():
            for number in range(len(experts)):
                expert: Any = experts[number]
                reader = linear_of(expert, slab.reader)
                seen = _seen_by(expert, reader, *call.of(number), call.hidden)
                one = self._choose(reader, seen, slab, seed + number)
                found.append(replace(one, weight=one.weight.to(reader.weight.dtype)))
        smaller: Any = self.served.layers[context.index].get_submodule(kind_of(layer).experts)
        experts.change(lambda number, expert: cut(expert, slab, found[number]), pattern=smaller[0])
        take_sizes(layer, self.served.layers[context.index])
        return sum(one.error for one in found) / len(found)


def _called(layer: nn.Module, context: LayerContext) -> RoutedCall:
    """What the routed experts are called with on the calibration text."""
    decoder = context.decoder
    with experts_of(layer).recording() as own:
        for batch in ranks.own(batches_of(context.calibration)):
            for _ in decoder.run_layer(layer, context.index, context.calibration[batch]):
                pass
    calls = ranks.in_order(own, decoder.device)
    return RoutedCall(
        torch.cat([one.hidden for one in calls]),
        torch.cat([one.chosen for one in calls]),
        torch.cat([one.gates for one in calls]),
    )


def _seen_by(expert: Any, reader: nn.Linear, tokens: Tensor, gates: Tensor, hidden: Tensor) -> Moments:
    """What an expert's last linear reads, times the gates that its output is multiplied by, which a bias is not.

    An expert with fewer tokens than inputs borrows of all tokens of its block.
    """
    seen = Moments(reader.in_features, reader.weight.device)
    given_out: Tensor = expert.middle(hidden[tokens])
    seen.add(given_out if reader.bias is not None else given_out.float() * gates.float().unsqueeze(1))
    lacking = reader.in_features - len(tokens)
    if lacking > 0:
        some: Tensor = expert.middle(hidden[:: max(1, len(hidden) // lacking)][:lacking])
        share = 1.0 if reader.bias is not None or not len(gates) else float(gates.float().mean())
        seen.add(some.float() * share)
    return seen


class PruneWidthKind:
    """What a recipe can say, and whether a model's configuration can say it too."""

    name = NAME
    options = PruneWidthOptions
    after = ()

    def make(
        self, options: PruneWidthOptions, config: Any, architecture: Architecture, model: str
    ) -> PruneWidth:
        """The sizes that a model's configuration will say; raises RecipeError where they cannot be."""
        before: dict[str, int] = {}
        asked: dict[str, bool] = {}
        changed: dict[str, int] = {}
        for option, keys in (("mlp", NETWORKS), ("expert", EXPERTS)):
            ratio, channels = getattr(options, f"{option}_ratio"), getattr(options, f"{option}_channels")
            if ratio is None and channels is None:
                continue
            key = next((one for one in keys if isinstance(given(config, one), int)), None)
            if key is None:
                raise RecipeError(
                    f"{NAME}.{option}_…: the configuration of {model} ({architecture.model_type}) says in no single "
                    f"number how wide it is (looked for: {', '.join(keys)}); leave the pass out"
                )
            before[key] = int(given(config, key))
            asked[BIASES] = options.biases
            changed[key] = _channels(option, ratio, channels, before[key], options.tensor_parallel)
        heads = _heads(config)
        if options.kv_groups is not None:
            changed |= _fewer_heads(options, config, architecture, model, heads)
            before["num_key_value_heads"] = heads
            asked[ATTENTION_BIASES] = options.biases
        for key in (key for key, wanted in asked.items() if wanted):
            if given(config, key) is None or not reads_biases(architecture.model_type):
                raise RecipeError(
                    f"{NAME}.biases: {model} is {architecture.model_type}, where no {key} of the configuration is "
                    "known to tell transformers and vLLM 0.32 alike of biases; leave biases out"
                )
            changed[key] = True
        return PruneWidth(changed, before, options, (heads, options.kv_groups or heads), model)


def _channels(option: str, ratio: float | None, channels: int | None, width: int, parallel: int) -> int:
    step = MULTIPLE * parallel
    allowed = list(range(step, width, step))
    if not allowed:
        raise RecipeError(
            f"{NAME}.{option}_…: networks of {width} channels cannot become narrower: kernels take multiples of "
            f"{MULTIPLE} on each of tensor_parallel = {parallel} devices; leave it out"
        )
    wanted = width * (1 - ratio) if ratio is not None else channels
    assert wanted is not None
    nearest = sorted(sorted(allowed, key=lambda count: abs(count - wanted))[:2])
    if ratio is None and channels not in allowed:
        raise RecipeError(
            f"{NAME}.{option}_channels = {channels}: of {width} channels, multiples of {step} may stay "
            f"(kernels take {MULTIPLE} on each of tensor_parallel = {parallel} devices); the nearest are "
            f"{' and '.join(map(str, nearest))}"
        )
    return min(allowed, key=lambda count: abs(count - wanted))


def _heads(config: Any) -> int:
    return int(given(config, "num_key_value_heads") or given(config, "num_attention_heads") or 1)


def _fewer_heads(
    options: PruneWidthOptions, config: Any, architecture: Architecture, model: str, heads: int
) -> dict[str, int]:
    kept, queries = options.kv_groups, int(config.num_attention_heads)
    assert kept is not None
    asked = f"{NAME}.kv_groups = {kept}"
    if architecture.latent_cache or not reads_head_dim(architecture.model_type):
        why = "attention caches a latent" if architecture.latent_cache else (
            "vLLM 0.32 is not known to read head_dim there: it would make wider heads of fewer"
        )  # fmt: skip
        raise RecipeError(f"{asked}: {model} is {architecture.model_type}: {why}; leave it out")
    allowed = [
        count for count in range(1, heads)
        if count % options.tensor_parallel == 0 or options.tensor_parallel % count == 0
    ]  # fmt: skip
    allowed = [one for one in allowed if queries // heads * one % options.tensor_parallel == 0]
    if kept not in allowed:
        raise RecipeError(
            f"{asked} of {heads} key and value heads, each with {queries // heads} query heads, for tensor_parallel = "
            f"{options.tensor_parallel}; allowed are {', '.join(map(str, allowed)) or 'none: leave it out'}"
        )
    size = int(given(config, "head_dim") or config.hidden_size // queries)
    return {
        "num_key_value_heads": kept, "num_attention_heads": queries // heads * kept, "head_dim": size
    }  # fmt: skip
