"""The weights of a planned model, checked against its configuration from the headers alone."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from lowbit_core.errors import ModelError
from lowbit_core.log import get_logger
from lowbit_quantize.model.decoder import read_as
from lowbit_quantize.model.files.base_weights import BaseWeights, wanted_of
from lowbit_quantize.model.files.leftovers import Leftovers, leftovers
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.plan import Plan

if TYPE_CHECKING:
    from lowbit_quantize.model.gguf_file import GgufFile

log = get_logger("quantize")

CARRIED_SHARD_BYTES = 2 << 30
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Base:
    """The weights of a model, and what its files hold beside them."""

    weights: BaseWeights
    rest: Leftovers

    @cached_property
    def carried_shards(self) -> list[list[str]]:
        """What is carried over, by names, in shards of a bounded size."""
        shards: list[list[str]] = []
        room = 0
        for name, place in self.rest.carried.items():
            size = sum(self.weights.files.bytes(part) for part in place.names)
            if room < size:
                shards.append([])
                room = CARRIED_SHARD_BYTES
            shards[-1].append(name)
            room -= size
        return shards

    @property
    def foreign(self) -> frozenset[str]:
        """What is carried over and is none of transformers' model: draft layers and other heads, but not towers."""
        return frozenset(name for name in self.rest.carried if not self.weights.wanted.names.claims(name))

    @property
    def carried_bytes(self) -> int:
        """Bytes of what is carried over, as it will be stored."""
        places = self.rest.carried.values()
        plain = sum(self.weights.files.bytes(place.name) for place in places if place.stored is None)
        return plain + sum(2 * math.prod(place.stored.shape) for place in places if place.stored is not None)

    def read_carried(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Untouched; numbers that the checkpoint's configuration does not describe any more are dequantized."""
        place = self.rest.carried[name]
        tensor = self.weights.read_place(place)
        return tensor if place.stored is None else tensor.to(dtype)


def stored_weights(plan: Plan) -> "WeightFiles | GgufFile":
    """The files as they were given."""
    if plan.reference.kind == "gguf":
        from lowbit_quantize.model.gguf_file import GgufFile  # other models do without its imports

        return GgufFile(plan.reference, plan.base.skeleton)
    return WeightFiles(plan.reference.path)


def checked_base(plan: Plan, stored: "WeightFiles | GgufFile") -> Base | None:
    """The weights, checked; None of a GGUF file, which is unpacked first. Raises ModelError."""
    if isinstance(stored, WeightFiles):
        return base_of(plan, stored)
    check_weights(plan, stored)
    return None


def base_of(plan: Plan, files: WeightFiles) -> Base:
    """The weights in these files, whole and in their shapes; raises ModelError where they are not."""
    weights = BaseWeights(files, wanted_of(plan.base.skeleton, plan.base.architecture), plan.floats)
    check_weights(plan, weights)
    rest = leftovers(
        weights,
        plan.base.skeleton,
        plan.base.architecture,
        plan.recipe.base.leave_out,
        plan.reference.name,
    )
    return Base(weights, rest)


def say_rest(rest: Leftovers) -> None:
    """Tell what is carried over and what is left out."""
    if rest.carried:
        log.info(
            "%d tensors are carried over untouched, the first is %s",
            len(rest.carried),
            next(iter(rest.carried)),
        )
    for name, reason in list(rest.left_out.items())[:3]:
        log.info("left out: %s (%s)", name, reason)
    if len(rest.left_out) > 3:
        log.info("left out: %d more tensors; the manifest names them", len(rest.left_out) - 3)


def check_weights(plan: Plan, weights: "BaseWeights | GgufFile") -> None:
    """Check, from the headers alone, that every weight is there in its shape; raises ModelError.

    A head that is tied may be absent; if it is stored, it must equal the embedding.
    """
    name, head = plan.reference.name, f"{plan.architecture.head}.weight"
    missing = []
    names = PublishedNames(plan.base.skeleton)
    for inner, parameter in plan.base.skeleton.state_dict().items():
        weight = names.published(inner)
        if inner not in weights:
            missing += [] if inner == head and plan.tied else [inner]
            continue
        shape, dtype = weights.shape(inner), weights.dtype(inner)
        if shape != tuple(parameter.shape):
            raise ModelError(
                f"{name}: {weight} has shape {shape}, its configuration asks for {tuple(parameter.shape)}"
            )
        floats = dtype in FLOATS or not parameter.is_floating_point()
        if not floats and not (isinstance(weights, BaseWeights) and weights.dequantizes(inner)):
            raise ModelError(
                f"{name}: {weight} is stored as {dtype}, and its configuration does not say how that is read; give "
                f"the unquantized model ({', '.join(FLOATS)})"
            )
    if missing:
        _refuse_missing(plan, missing, weights)
    embedding = f"{plan.architecture.embedding}.weight"
    if isinstance(weights, BaseWeights) and weights.is_same(head, embedding):
        return
    if plan.tied and head in weights and not torch.equal(weights.read(head), weights.read(embedding)):
        raise ModelError(
            f"{name} says that its embeddings are tied and stores another {head}; set one of them right"
        )


def check_numbers(plan: Plan, base: Base) -> None:
    """Read what a walk reads last, so that a NaN there is not found after hours; raises NumericsError."""
    head = plan.architecture.embedding if plan.tied else plan.architecture.head
    for name in (plan.architecture.final_norm, head):
        weight = f"{name}.weight"
        read_as(base.weights, weight, plan.kept_types.dtype(weight, plan.dtype), torch.device("cpu"))


def _refuse_missing(plan: Plan, missing: list[str], weights: "BaseWeights | GgufFile") -> None:
    name, head = plan.reference.name, f"{plan.architecture.head}.weight"
    published = PublishedNames(plan.base.skeleton).published(missing[0])
    if missing == [head]:
        raise ModelError(
            f"{name} lacks {published} and its embeddings are not tied: it gives no next tokens, by which quality is "
            "measured; give the model with its head"
        )
    example = (
        f"; its files hold names like {weights.example(published)}"
        if isinstance(weights, BaseWeights)
        else ""
    )
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise ModelError(
        f"{name} lacks the tensor {published}{more}, for which its configuration asks{example}; set num_hidden_layers "
        "and the like right, or fetch the model again"
    )
