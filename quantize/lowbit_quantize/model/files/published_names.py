"""What a model's tensors are called where people publish them, by transformers' own table of conversions.

transformers (5) renames, stacks, joins, cuts and turns published tensors while it loads them, and does the reverse when
it saves. Its table says all that for every family (`get_model_conversion_mapping`), and its own code applies it here: a
name in files becomes the name of the tensor that it is a part of, and a tensor of the model gets the name that it is
saved under. Experts, which are single ones here (`experts/`), keep the names of single ones where the family publishes
them so, or in a way that transformers reads; where only stacks are known, names are made like those of other families.
"""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from lowbit_quantize.model.experts.linears import ExpertList, Slice
from lowbit_quantize.model.files.restacking import restacked


@dataclass(frozen=True)
class Claim:
    """What a published tensor is for: a tensor of the model as transformers has it (`target`), of which it is the part
    that `pattern` names in `converter`, and there the one of expert `number`; without converter it is the tensor.
    """

    target: str
    converter: WeightConverter | None = None
    pattern: str = ""
    number: int | None = None


@dataclass(frozen=True)
class Shaped:
    """Stands for a model where a conversion asks for nothing but the shape of the tensor that comes out."""

    shape: tuple[int, ...]

    def get_parameter(self, _: str) -> Tensor:
        return torch.empty(self.shape, device="meta")


class PublishedNames:
    """The names of one model, from its skeleton: `slices` has the experts' tensors, `stacks` the shapes of theirs."""

    def __init__(self, skeleton: nn.Module) -> None:
        model: Any = skeleton
        self._prefix: str = model.base_model_prefix
        self.config: Any = model.config
        self.slices = dict(_slices(skeleton))
        self._single = frozenset(_written_single(skeleton))
        inner = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        self.inner = frozenset(inner)
        self.shapes = {name: shape for name, shape in inner.items() if name not in self.slices}
        self.shapes |= _stack_shapes(inner, self.slices)
        self._reading = _parted(get_model_conversion_mapping(model))
        saving = [
            one
            for one in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(one, PrefixChange)  # whether the prefix was there is not known
        ]
        self._saving = _parted([one.reverse_transform() for one in reversed(saving)])

    # From the names in files.

    def claims(self, published: str) -> list[Claim]:
        """What a tensor of that name is for; nothing where the model knows none."""
        found = self._claim(published)
        if found is None:
            return []
        converter = found.converter
        if converter is None or len(converter.target_patterns) == 1:
            return [found]
        first = converter.target_patterns[0]
        targets = [found.target.replace(first, pattern, 1) for pattern in converter.target_patterns]
        return [Claim(target, converter, found.pattern) for target in targets if target in self.shapes]

    def inner_name(self, published: str) -> str:
        """What a tensor would be called in the model, whether or not it is there."""
        name, _ = rename_source_key(published, *self._reading, self._prefix, self.shapes)
        return str(name)

    def _claim(self, published: str) -> Claim | None:
        renamings, converters = self._reading
        target, pattern = rename_source_key(published, renamings, converters, self._prefix, self.shapes)
        if target not in self.shapes and published in self.shapes:
            target, pattern = rename_source_key(published, [], [], self._prefix, self.shapes)
        if target not in self.shapes:
            return None
        if pattern is None:
            return Claim(target)
        converter = next(one for one in converters if pattern in one.source_patterns)
        plain, _ = rename_source_key(published, renamings, [])
        number = re.search(pattern.replace("*.", r"(\d+)\."), plain) if "*." in pattern else None
        return Claim(target, converter, pattern, int(number[1]) if number else None)

    # To the names that a checkpoint has.

    def published(self, name: str) -> str:
        """The published name of a tensor or a module of the model, or of what a linear's weight becomes."""
        if name in self.inner:
            return self._table[name]
        if f"{name}.weight" in self.inner:
            return self._table[f"{name}.weight"].removesuffix(".weight")
        module, _, leaf = name.rpartition(".")
        if f"{module}.weight" in self.inner:
            return f"{self.published(module)}.{leaf}"
        return _renamed(name, self._saving[0])

    @cached_property
    def closed(self) -> frozenset[str]:
        """The experts' linears that transformers knows as parts of a stack only, and opens no others."""
        return frozenset(
            name.removesuffix(".weight")
            for name, part in self.slices.items()
            if name.endswith(".weight") and not self._saved_single(part)
        )

    def is_stacked(self, name: str) -> bool:
        """Whether readers want a tensor of the model in a stack with those of other experts."""
        part = self.slices.get(name)
        return part is not None and not self._saved_single(part)

    def publish(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model as a checkpoint has them: stacked, joined or cut again where its readers ask for that.

        What is quantized stays the linear that it is.
        """
        found, rest = dict[str, Tensor](), dict[str, Tensor]()
        whole, single = restacked(tensors, self.slices, self._saved_single)
        for name, tensor in single.items():
            converted = name in self.inner and name not in self.slices and self._converts(name)
            (rest if converted else found)[name if converted else self.published(name)] = tensor
        return found | self._converted(whole | rest)

    def _converted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamings, converters = self._saving
        mappings: dict[str, WeightConverter | WeightRenaming] = {}
        for name in sorted(tensors):
            renamed, pattern = rename_source_key(name, renamings, converters, reverse=True)
            if pattern is None:
                mapping = mappings.setdefault(renamed, WeightRenaming(name, renamed))
            else:
                converter = next(one for one in converters if pattern in one.source_patterns)
                mapping = mappings.setdefault(renamed, deepcopy(converter))
            mapping.add_tensor(renamed, name, pattern or name, tensors[name])
        found: dict[str, Tensor] = {}
        for renamed, mapping in mappings.items():
            shape = next(iter(mapping.collected_tensors.values()))[0].shape
            for target, value in mapping.convert(renamed, Shaped(shape), self.config).items():
                found[target] = (value[0] if isinstance(value, list) else value).contiguous()
        return found

    @cached_property
    def _table(self) -> dict[str, str]:
        return {name: self._published(name) for name in self.inner}

    def _published(self, name: str) -> str:
        part, (renamings, converters) = self.slices.get(name), self._saving
        if part is None:
            return str(rename_source_key(name, renamings, converters, reverse=True)[0])
        converter = self._to_single(part)
        if converter is None:
            return _renamed(name, renamings)
        stacked, _ = converter.rename_source_key(part.stack)
        patterns = converter.target_patterns
        second = len(patterns) > 1 and part.rows is not None and bool(part.rows.start)
        single = stacked.replace(patterns[0], patterns[1 if second else 0], 1)
        return _renamed(single.replace("*", str(part.entry), 1), renamings)

    def _saved_single(self, part: Slice) -> bool:
        """Whether an expert's tensor is saved by itself, and not as a part of a stack."""
        return part.stack.rpartition(".")[0] in self._single or self._to_single(part) is not None

    def _to_single(self, part: Slice) -> WeightConverter | None:
        for converter in self._saving[1]:
            _, pattern = converter.rename_source_key(part.stack)
            if pattern is not None:
                return converter if "*" in converter.target_patterns[0] else None
        return None

    def _converts(self, name: str) -> bool:
        return rename_source_key(name, [], self._saving[1], reverse=True)[1] is not None


def joins_whole_experts(converter: WeightConverter) -> bool:
    """Whether a converter only stacks experts, gate before up: then each linear of each is one published tensor."""
    merge, *rest = converter.operations
    joins = [type(one) is Concatenate and one.dim == 1 for one in rest]
    return type(merge) is MergeModulelist and merge.dim == 0 and joins in ([], [True])


def _parted(transforms: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    return renamings, [one for one in transforms if isinstance(one, WeightConverter)]


def _renamed(name: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _slices(skeleton: nn.Module) -> Iterator[tuple[str, Slice]]:
    for block, module in skeleton.named_modules():
        if isinstance(module, ExpertList):
            for name, part in module.slices():
                stack = f"{block}.{part.stack}"
                yield f"{block}.{name}", Slice(stack, part.entry, part.rows, part.turned)


def _written_single(skeleton: nn.Module) -> Iterator[str]:
    """The lists of experts that transformers reads one by one, whatever its table says."""
    for block, module in skeleton.named_modules():
        if isinstance(module, ExpertList) and module.written_single:
            yield block


def _stack_shapes(
    inner: Mapping[str, tuple[int, ...]], slices: Mapping[str, Slice]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the stacks that the experts' tensors are parts of."""
    found: dict[str, tuple[int, ...]] = {}
    experts: dict[str, int] = {}
    for name, part in slices.items():
        outputs, *inputs = inner[name]
        outputs *= 2 if part.rows else 1
        entry = (*inputs, outputs) if part.turned else (outputs, *inputs)
        experts[part.stack] = max(experts.get(part.stack, 0), part.entry + 1)
        found[part.stack] = (experts[part.stack], *entry)
    return found
