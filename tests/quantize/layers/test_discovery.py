"""Groups and folds are found by running a layer, and what only looks like a fold is not one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lowbit_core.errors import ModelError
from lowbit_quantize.model.architecture import LayerKind
from lowbit_quantize.model.discovery.found import describe
from lowbit_quantize.model.discovery.probe import ProbedLayer
from lowbit_quantize.model.discovery.twin import Call
from lowbit_quantize.model.experts.linears import unstack_experts

HIDDEN, MIDDLE = 32, 48


class Norm(nn.Module):
    """A root mean square norm without a name that says so."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(0.5 + torch.rand(size)), offset

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * inputs.square().mean(-1, keepdim=True).rsqrt() * (self.weight + self.offset)


class Network(nn.Module):
    """A decoder layer without attention: `middle` says what happens between its linears."""

    def __init__(
        self, middle: Callable[[Tensor, Tensor], Tensor], offset: float = 0.0, *, leak: bool = False
    ) -> None:
        super().__init__()
        self.before = Norm(HIDDEN, offset)
        self.one, self.other = nn.Linear(HIDDEN, MIDDLE), nn.Linear(HIDDEN, MIDDLE)
        self.last, self.middle, self.leak = nn.Linear(MIDDLE, HIDDEN), middle, leak

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        read = self.before(hidden_states)
        added: Tensor = self.last(self.middle(self.one(read), self.other(read)))
        return hidden_states + added + (read if self.leak else 0)


def kind_of(layer: nn.Module) -> LayerKind:
    torch.manual_seed(1)
    layer.requires_grad_(False)
    hidden = torch.zeros(2, 24, HIDDEN)
    return describe(ProbedLayer(Call(layer, hidden, (), {}, 0), block_rows=8), layer)


def folds_of(kind: LayerKind) -> dict[str, tuple[str, float, int]]:
    return {
        ",".join(group.linears): (group.fold.producer, group.fold.offset, group.fold.power)
        for group in kind.groups
        if group.fold
    }


FOLDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[str, float, int] | None]] = {
    "a gate of any kind": (lambda one, other: one.sigmoid() * other, ("other", 0.0, 1)),
    "both may be divided, the first is": (lambda one, other: one * other, ("one", 0.0, 1)),
    "a square": (lambda one, other: one.relu().square() + 0 * other, ("one", 0.0, 2)),
    "a relu": (lambda one, other: one.relu() + 0 * other, ("one", 0.0, 1)),
    "a sum of two": (lambda one, other: one + other, None),
    "a gelu": (lambda one, other: nn.functional.gelu(one + 0 * other), None),
    "a product that is clamped out of reach": (lambda one, other: one.sigmoid() * other.clamp(-9, 9), None),
    "a product of a shifted part": (lambda one, other: one.sigmoid() * (other + 1), None),
    "a tanh of a small part": (lambda one, other: one.sigmoid() * (other * 0.05).tanh(), None),
}


@pytest.mark.parametrize("name", FOLDS)
def test_only_what_leaves_the_output_as_it_was_is_a_fold(name: str) -> None:
    middle, expected = FOLDS[name]
    found = folds_of(kind_of(Network(middle)))
    assert found.get("last") == expected
    assert found["one,other"] == ("before", 0.0, 1)


def test_a_norm_may_add_to_its_weight() -> None:
    kind = kind_of(Network(lambda one, other: one.sigmoid() * other, offset=1.0))
    assert folds_of(kind)["one,other"] == ("before", 1.0, 1)


def test_a_norm_that_something_else_reads_is_no_fold_and_the_reason_is_said() -> None:
    kind = kind_of(Network(lambda one, other: one.sigmoid() * other, leak=True))
    assert "one,other" not in folds_of(kind)
    assert [line.partition(":")[0] for line in kind.dropped] == ["before to one"]


def test_groups_are_in_the_order_in_which_they_compute() -> None:
    kind = kind_of(Network(lambda one, other: one.sigmoid() * other))
    assert [(group.linears, group.stage) for group in kind.groups] == [(("one", "other"), 0), (("last",), 1)]
    assert kind.groups[1].residual == "before"
    assert (kind.attention, kind.middle, kind.experts) == ("", "", "")


class Routed(nn.Module):
    """A decoder layer whose tokens all go to the same experts."""

    def __init__(self, chosen: tuple[int, ...]) -> None:
        super().__init__()
        sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": MIDDLE, "num_experts": 4}
        self.before, self.chosen = Norm(HIDDEN), chosen
        self.router, self.experts = nn.Linear(HIDDEN, 4), Qwen3MoeExperts(Qwen3MoeConfig(**sizes))
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.3)
        unstack_experts(self)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        read = self.before(hidden_states).view(-1, HIDDEN)
        chosen = torch.tensor(self.chosen).expand(len(read), -1)
        gates = self.router(read).softmax(-1).gather(1, chosen)
        added: Tensor = self.experts(read, chosen, gates)
        return hidden_states + added.view_as(hidden_states)


@pytest.mark.parametrize("chosen", [(0, 1), (1, 3), (3,)])
def test_whichever_experts_are_used_stand_for_all(chosen: tuple[int, ...]) -> None:
    found = [group.linears for group in kind_of(Routed(chosen)).groups]
    assert found == [("experts.*.gate_proj", "experts.*.up_proj"), ("experts.*.down_proj",)]


def test_experts_of_which_none_is_used_are_refused() -> None:
    with pytest.raises(ModelError, match="no expert of experts was given a token"):
        kind_of(Routed(()))


class Leaves(nn.Module):
    """A decoder layer that leaves what it calls values for later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.output = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor, left: dict[str, tuple[Tensor]]) -> Tensor:
        left["values"] = (self.value(hidden),)
        added: Tensor = self.output(left["values"][0])
        return hidden + added


@pytest.mark.parametrize("left", ["", "left"])
def test_a_scale_does_not_fold_into_what_later_layers_read(left: str) -> None:
    layer = Leaves().requires_grad_(False)
    call = Call(layer, torch.zeros(2, 24, HIDDEN), (), {"left": {}}, 0, left)
    kind = describe(ProbedLayer(call, block_rows=8), layer)
    assert folds_of(kind) == ({} if left else {"output": ("value", 0.0, 1)})
    assert [line.partition(":")[0] for line in kind.dropped] == (["value to output"] if left else [])
