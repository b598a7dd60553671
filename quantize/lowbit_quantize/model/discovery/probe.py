"""One decoder layer of a twin that is run again and again, and what its modules read and give each time."""

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_quantize.model.discovery.twin import Call
from lowbit_quantize.model.experts.linears import ExpertList
from lowbit_quantize.model.hooks import attention_observed_by, removed_after

Change = Callable[[Tensor], Tensor]


@dataclass
class Seen:
    """One run: the layer's output and what it left for others; by name what modules read, where they read the first
    tensor, and what they gave.
    """

    output: Tensor
    left: list[Tensor] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)  # of modules, as they were called
    tuples: dict[str, int] = field(default_factory=dict)  # lengths of the tuples that modules gave
    attention: str = ""  # the module that computed attention
    before_attention: int = 0  # how many modules had been called when it did


class ProbedLayer:
    """A decoder layer with the arguments that it was called with."""

    def __init__(self, call: Call, block_rows: int, hidden: Tensor | None = None) -> None:
        """`block_rows` of a projection are surely of one part of it; `hidden` is by default normal and seeded."""
        self.module, self.block_rows = call.layer, block_rows
        self._args, self.outputs, self._left, self.form = call.args, call.outputs, call.left, call.form
        self._kwargs = {name: value for name, value in call.kwargs.items() if name != "past_key_values"}
        if hidden is None:
            hidden = torch.randn(call.hidden.shape, generator=torch.Generator().manual_seed(7))
        self.hidden = hidden
        self.names = [name for name, _ in self.module.named_modules() if name]

    @property
    def one_copy(self) -> int:
        """Numbers in one copy of the hidden states."""
        return self.hidden.numel() // self.form.copies

    def by_token(self, output: Tensor) -> Tensor:
        """What the layer gave, (sequences, tokens, …)."""
        return output.movedim(0, 2) if self.form.copies_first else output

    @cached_property
    def base(self) -> Seen:
        """The layer as it is."""
        return self.run()

    @cached_property
    def experts(self) -> str:
        """The routed experts' name, empty where there are none."""
        return next(
            (name for name, module in self.module.named_modules() if isinstance(module, ExpertList)), ""
        )

    @cached_property
    def first_expert(self) -> str:
        """The number of the first expert that is given tokens, which stands for all; empty where there are none."""
        given = {self.expert_of(name) for name in self.base.inputs} - {""}
        return min(given, key=int, default="")

    def own_weight(self, name: str) -> nn.Parameter | None:
        weight = getattr(self.module.get_submodule(name), "weight", None)
        return weight if isinstance(weight, nn.Parameter) else None

    def expert_of(self, name: str) -> str:
        """The number of the expert that a module is in; empty for all others."""
        prefix = f"{self.experts}."
        return name.removeprefix(prefix).partition(".")[0] if self.experts and name.startswith(prefix) else ""

    def reads(self, name: str) -> str:
        """Whose input a module's is: an expert's first linears read, token by token, what all experts are given."""
        first = self.expert_of(name) and not name.endswith(".down_proj")
        return self.experts if first else name

    def run(self, hidden: Tensor | None = None, changes: Mapping[str, Change] | None = None) -> Seen:
        """Run the layer, with changes to what modules give."""
        seen, stack = Seen(torch.empty(0)), [""]
        given = self.hidden if hidden is None else hidden

        def observed(*_: Any) -> None:
            seen.attention = seen.attention or stack[-1]
            seen.before_attention = seen.before_attention or len(seen.order)

        with ExitStack() as watched, torch.no_grad():
            watched.enter_context(attention_observed_by(observed))
            for name in self.names:
                watched.enter_context(_watched(self.module, name, seen, stack, (changes or {}).get(name)))
            output, left = self.call(self.module, None, given)
        seen.output, seen.left = _first(output), left
        return seen

    def call(
        self, module: nn.Module, dtype: torch.dtype | None = None, hidden: Tensor | None = None
    ) -> tuple[Any, list[Tensor]]:
        """Call a layer as this one is, with all floats in `dtype` where one is given; also what is left then."""
        given, args, kwargs = _copied(
            (self.hidden if hidden is None else hidden, self._args, self._kwargs), dtype
        )
        output = module(given, *args, **kwargs)
        left = kwargs[self._left].values() if self._left else ()
        return output, [tensor for tensors in left for tensor in tensors]


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether two are views of the same numbers, row by row."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.numel() == other.numel()
        and one.shape[-1] == other.shape[-1]
    )


def _copied(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if dtype and value.is_floating_point() else value.clone()
    if isinstance(value, dict | UserDict):
        return type(value)({key: _copied(one, dtype) for key, one in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_copied(one, dtype) for one in value)
    return value


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _watched(
    layer: nn.Module, name: str, seen: Seen, stack: list[str], change: Change | None
) -> Iterator[None]:
    module = layer.get_submodule(name)

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append(name)
        read = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
        if read is not None and name not in seen.inputs:
            seen.inputs[name] = read
            seen.order.append(name)

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        stack.pop()
        gave = _first(output)
        seen.tuples[name] = len(output) if isinstance(output, tuple) else 0
        if isinstance(gave, Tensor):
            if change is not None:
                gave = change(gave)
                output = (gave, *output[1:]) if isinstance(output, tuple) else gave
            seen.outputs.setdefault(name, gave)
        return output

    handles = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    )
    with removed_after(handles):
        yield
