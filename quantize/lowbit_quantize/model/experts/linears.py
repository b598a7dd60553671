"""Routed experts as plain linears, observed where their block calls them with hidden states, indices and gates.

transformers holds a layer's experts as stacked tensors and says how by its experts' protocol (the decorator
`use_experts_implementation`): gate and up one after the other or interleaved, transposed, with biases, without a gate,
and with a way of its own to put gate and up together. Here they are a list of small networks of plain linears, named as
published checkpoints name them, so that the walk treats an expert's linears like any others; what a family computes
between them is the family's own code.

One stack is not of the protocol and still taken apart (`SORTED`, Llama 4's): it is called with rows that lie sorted by
expert, which a gate has multiplied, and gives rows. transformers itself puts single experts in its place when it reads
a quantized checkpoint, so they are written single.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations import moe
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

# Called with an expert's number, its outputs (tokens, hidden) and its gates (tokens,).
ExpertObserver = Callable[[int, Tensor, Tensor], None]
PLAIN_GATE = moe._default_apply_gate  # act(gate) · up
PROTOCOL = ("is_transposed", "is_concatenated", "has_gate", "has_bias")
SORTED = frozenset(MODULES_TO_PATCH_FOR_QUANTIZATION)  # names of classes
STACKS = frozenset(
    f"{name}{end}" for name in ("gate_up_proj", "up_proj", "down_proj") for end in ("", "_bias")
)


@dataclass(frozen=True)
class Slice:
    """Which part of a stacked tensor is one of an expert's: `stack[entry]`, turned if it is (in, out), of it `rows`."""

    stack: str
    entry: int
    rows: slice | None = None
    turned: bool = False

    def of(self, entry: Tensor) -> Tensor:
        """The part, of one entry of the stack."""
        found = entry.T if self.turned else entry
        return found[self.rows] if self.rows else found


class SortedStack:
    """What the protocol would say of one of `SORTED`: (in, gate and up) and (middle, out), an activation, no biases."""

    is_transposed, is_concatenated, has_gate, has_bias = True, True, True, False
    _apply_gate = PLAIN_GATE

    def __init__(self, stack: Any) -> None:
        self.gate_up_proj, self.down_proj, self.act_fn = stack.gate_up_proj, stack.down_proj, stack.act_fn


class Expert(nn.Module):
    """`down(act(gate(x)) · up(x))`, or what the family makes of gate and up; without a gate `down(act(up(x)))`."""

    def __init__(self, owner: Any, dtype: torch.dtype, device: torch.device) -> None:
        """`owner` held the stack, whose sizes and code these are."""
        super().__init__()
        wide = owner.down_proj.shape[1:]
        hidden, middle = reversed(wide) if owner.is_transposed else wide
        options: dict[str, Any] = {"bias": owner.has_bias, "dtype": dtype, "device": device}
        self.gate_proj = nn.Linear(hidden, middle, **options) if owner.has_gate else None
        self.up_proj = nn.Linear(hidden, middle, **options)
        self.down_proj = nn.Linear(middle, hidden, **options)
        self._owner = (owner,)  # no submodule: it is every expert's

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.middle(inputs))
        return output

    def middle(self, inputs: Tensor) -> Tensor:
        """What the last linear reads: (tokens, hidden) to (tokens, intermediate)."""
        owner, up = self._owner[0], self.up_proj(inputs)
        if self.gate_proj is None:
            alone: Tensor = owner.act_fn(up)
            return alone
        gate = self.gate_proj(inputs)
        if type(owner)._apply_gate is PLAIN_GATE:
            product: Tensor = owner.act_fn(gate) * up
            return product
        both = torch.cat((gate, up), -1) if owner.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
        own: Tensor = owner._apply_gate(both)
        return own


class Experts(Protocol):
    """The routed experts of a block, whether all are in memory or each is made when it is asked for."""

    observer: ExpertObserver | None

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Any: ...


def routed_sum(experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Sum of gate · output over each token's experts: (tokens, hidden), (tokens, k), (tokens, k)."""
    parts = hidden_states.new_zeros(
        *top_k_index.shape,
        hidden_states.shape[-1],
        dtype=torch.promote_types(hidden_states.dtype, top_k_weights.dtype),
    )
    for number in range(len(experts)):
        token, place = torch.where(top_k_index == number)
        if not len(token):
            continue
        output, gates = experts[number](hidden_states[token]), top_k_weights[token, place]
        if experts.observer is not None:
            experts.observer(number, output, gates)
        parts[token, place] = (output * gates.unsqueeze(-1)).to(parts.dtype)  # of bfloat16 under autocast
    return parts.sum(1).to(hidden_states.dtype)


class Routed(nn.Module):
    """Experts that are called as transformers' stacked ones are: with tokens, indices and gates.

    Where rows alone come, (experts · tokens, hidden), they are sorted by expert, and those of an expert that a token
    has not chosen are zeros. Whoever looks in then sees the other rows, each as a token of one expert.
    """

    def __call__(self, hidden_states: Tensor, *routed: Tensor, **named: Tensor) -> Tensor:
        if routed or named:
            outputs: Tensor = super().__call__(hidden_states, *routed, **named)
            return outputs
        outputs, used = torch.zeros_like(hidden_states), (hidden_states != 0).any(-1)
        rows, count = hidden_states[used], len(self)  # type: ignore[arg-type]
        places = torch.nonzero(used) // (len(used) // count) if count else used.new_zeros(len(rows), 0).long()
        outputs[used] = super().__call__(rows, places, torch.ones_like(places, dtype=rows.dtype))
        return outputs


class ExpertList(Routed, nn.ModuleList):
    """The routed experts of one block.

    `written_single`: transformers reads them one by one, whatever stack its own table of conversions knows.
    """

    observer: ExpertObserver | None = None
    written_single = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `routed_sum`."""
        return routed_sum(self, hidden_states, top_k_index, top_k_weights)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """Every tensor of the list, by its name in it, and where transformers' stacks have it, by their names there."""
        for number, expert in enumerate(self):
            for name, parameter in expert.named_parameters():
                linear, _, kind = name.partition(".")
                yield f"{number}.{name}", _slice(expert, linear, kind, number, parameter.shape[0])


def _slice(expert: Any, linear: str, kind: str, number: int, middle: int) -> Slice:
    owner = expert._owner[0]
    turned = owner.is_transposed and kind == "weight"
    ending = "_bias" if kind == "bias" else ""
    if linear == "down_proj" or not owner.has_gate:
        return Slice(f"{linear}{ending}", number, None, turned)
    first = linear == "gate_proj"
    if owner.is_concatenated:
        rows = slice(0, middle) if first else slice(middle, None)
    else:
        rows = slice(0 if first else 1, None, 2)
    return Slice(f"gate_up_proj{ending}", number, rows, turned)


def is_stack(module: nn.Module) -> bool:
    """Whether a module holds experts by transformers' protocol, or sorted ones, and nothing else."""
    held = {name for name, _ in module.named_parameters()}
    if type(module).__name__ in SORTED:
        return held == {"gate_up_proj", "down_proj"}
    return all(hasattr(module, name) for name in PROTOCOL) and "down_proj" in held and held <= STACKS


def unstack_experts(module: nn.Module) -> list[str]:
    """Put an `ExpertList` in the place of all stacked experts in a module; the names of these.

    Weights go with them, unless the module has none (the meta device).
    """
    names = [name for name, inner in module.named_modules() if is_stack(inner)]
    for name in names:
        module.set_submodule(name, _unstacked(module.get_submodule(name)))
    return names


def _unstacked(stack: Any) -> ExpertList:
    is_sorted, down = type(stack).__name__ in SORTED, stack.down_proj
    owner = SortedStack(stack) if is_sorted else stack
    experts = ExpertList(Expert(owner, down.dtype, down.device) for _ in range(len(down)))
    parameters = dict(experts.named_parameters())
    if not down.is_meta:
        with torch.no_grad():
            for name, part in experts.slices():
                parameters[name].copy_(part.of(getattr(owner, part.stack)[part.entry]))
    stack._parameters.clear()
    if isinstance(owner, SortedStack):
        del owner.gate_up_proj, owner.down_proj
    experts.written_single = is_sorted
    return experts


def expert_outputs(experts: Experts, inputs: Tensor) -> Tensor:
    """What every expert gives for every token: (tokens, hidden) to (tokens, experts, hidden)."""
    with torch.no_grad():
        return torch.stack([experts[number](inputs) for number in range(len(experts))], dim=1)
