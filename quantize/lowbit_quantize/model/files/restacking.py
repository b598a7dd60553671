"""Experts put together again, for readers that know only stacks of them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lowbit_quantize.model.experts.linears import Slice


def restacked(
    tensors: Mapping[str, Tensor], slices: Mapping[str, Slice], is_single: Callable[[Slice], bool]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole stacks by their names, and what stays by itself by its own name.

    A stack is whole where all its parts are there. Where one linear of a block's experts is quantized, which is another
    tensor, all of them stay single.
    """
    parts: dict[str, dict[str, Slice]] = {}
    for name in tensors:
        part = slices.get(name)
        if part is not None and not is_single(part):
            parts.setdefault(part.stack, {})[name] = part
    blocks = {stack: f"{stack.rpartition('.')[0]}." for stack in parts}
    changed = {
        block
        for block in set(blocks.values())
        for name in tensors.keys() - slices.keys()
        if name.startswith(block)
    }
    whole = {
        stack: found for stack, found in parts.items() if blocks[stack] not in changed and _is_whole(found)
    }
    used = {name for found in whole.values() for name in found}
    stacks = {stack: _stacked(tensors, found) for stack, found in whole.items()}
    return stacks, {name: tensor for name, tensor in tensors.items() if name not in used}


def _is_whole(parts: Mapping[str, Slice]) -> bool:
    entries = {part.entry for part in parts.values()}
    kinds = {str(part.rows) for part in parts.values()}
    both = len(kinds) == (1 if "None" in kinds else 2)
    return both and len(entries) * len(kinds) == len(parts) and entries == set(range(len(entries)))


def _stacked(tensors: Mapping[str, Tensor], parts: Mapping[str, Slice]) -> Tensor:
    entries: dict[int, Tensor] = {}
    for name, part in parts.items():
        tensor = tensors[name]
        outputs, *inputs = tensor.shape
        if part.entry not in entries:
            entries[part.entry] = tensor.new_empty((outputs * (2 if part.rows else 1), *inputs))
        entries[part.entry][part.rows or slice(None)] = tensor
    turned = next(iter(parts.values())).turned
    return torch.stack([entries[number].T if turned else entries[number] for number in sorted(entries)])
