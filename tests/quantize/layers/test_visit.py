"""Experts that are visited: a layer gives what it gives with all of them in memory, and holds one at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.quantize.layers.test_decoder import decoder_of
from torch import Tensor, nn

from lowbit_quantize.model.architecture import kind_of
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.experts.visited import VisitedExperts
from lowbit_quantize.run.tensor_file import TensorFile
from lowbit_quantize.walk.visit import Traveller, advance, experts_of, visit

LAYER = 2
TinyModel = Callable[[str], Path]


def hidden_of(decoder: Decoder) -> Tensor:
    ids = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(4))
    return decoder.embed(ids)


def whole(decoder: Decoder, hidden: Tensor) -> Tensor:
    """What the layer gives with all its experts in memory."""
    return torch.cat(list(decoder.run_layer(decoder.load_layer(LAYER), LAYER, hidden)))


def test_a_layer_that_visits_its_experts_gives_what_the_whole_one_gives(
    tiny_model: TinyModel, moe_family: str
) -> None:
    decoder = decoder_of(tiny_model(moe_family))
    hidden = hidden_of(decoder)
    frame, visited = decoder.load_frame(LAYER), hidden.clone()
    advance(decoder, frame, LAYER, visited)
    torch.testing.assert_close(visited, whole(decoder, hidden), rtol=2e-2, atol=2e-2)
    lazily = torch.cat(list(decoder.run_layer(frame, LAYER, hidden)))
    assert torch.equal(lazily, whole(decoder, hidden))


@pytest.mark.parametrize("together", [1, 3])
def test_each_expert_is_read_once_for_all_streams_and_the_served_one_is_seen_by_those_that_ask(
    tiny_model: TinyModel, moe_family: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(tiny_model(moe_family))
    hidden, read = hidden_of(decoder), list[str]()
    load = decoder.load_part

    def noted(index: int, name: str) -> nn.Module:
        read.append(name)
        return load(index, name)

    monkeypatch.setattr(decoder, "load_part", noted)
    layer, base = decoder.load_frame(LAYER), decoder.load_frame(LAYER)
    streams = [hidden.clone(), hidden.clone(), hidden.clone().float()]
    travellers = [
        Traveller(streams[0], base),
        Traveller(streams[1], layer, compressed=True),
        Traveller(streams[2], decoder.load_frame(LAYER).float()),
    ]

    served, kept = list[list[int]](), list[None]()

    def silence(experts: Mapping[int, nn.Module]) -> None:
        served.append(list(experts))
        for expert in experts.values():
            last: Any = expert.get_submodule("down_proj")
            last.weight = nn.Parameter(torch.zeros_like(last.weight), requires_grad=False)

    visit(decoder, LAYER, travellers, experts_of(layer), silence, kept.append, together)
    assert kept == [None] * len(served)
    assert served == ([[0, 1, 2], [3, 4, 5], [6, 7]] if together == 3 else [[one] for one in range(8)])
    assert read == [f"{kind_of(layer).experts}.{number}" for number in range(8)]
    expected = whole(decoder, hidden)
    torch.testing.assert_close(streams[0], expected, rtol=2e-2, atol=2e-2)
    exact = torch.cat(list(decoder.run_layer(decoder.load_layer(LAYER).float(), LAYER, hidden.float())))
    torch.testing.assert_close(streams[2], exact, rtol=1e-4, atol=1e-4)
    without = decoder.load_frame(LAYER)
    with experts_of(without).silent():
        silent = torch.cat(list(decoder.run_layer(without, LAYER, hidden)))
    assert torch.equal(streams[1], silent)


def test_changes_are_made_to_each_expert_that_is_made_and_follow_it_when_others_go() -> None:
    made = list[int]()

    def make(number: int) -> nn.Module:
        made.append(number)
        linear = nn.Linear(2, 2, bias=False)
        nn.init.constant_(linear.weight, float(number))
        return nn.ModuleDict({"up": linear}).requires_grad_(False)

    def first(one: nn.Module) -> float:
        return float(one.get_submodule("up").weight[0, 0])  # type: ignore[index]

    experts = VisitedExperts(make, make(0), range(4))
    experts.multiply("up", torch.tensor([10.0, 1.0]))
    experts.replace(2, {"up.weight": torch.full((2, 2), 7.0)})
    assert [first(experts[number]) for number in range(4)] == [0, 10, 7, 30]
    fewer = experts.only([2, 3])
    fewer.multiply("up", torch.tensor([2.0, 1.0]))
    assert [first(fewer[number]) for number in range(2)] == [14, 60]
    made.clear()
    assert first(fewer[1]) == 60  # held
    assert made == []


def test_a_file_that_is_written_part_by_part_reads_as_any_other(tmp_path: Path) -> None:
    parts: list[dict[str, Tensor]] = [
        {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7, dtype=torch.int64)},
        {"c": torch.tensor([1.5]), "d": torch.randn(4, 8).to(torch.float8_e4m3fn), "e": torch.tensor(3)},
        {"f": torch.randn(0, 4), "g": torch.ones(2, 2, dtype=torch.bool)},
    ]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    file = TensorFile(tmp_path / "out.safetensors", scratch, 7)
    for part in parts:
        file.add(part)
    assert not (tmp_path / "out.safetensors").exists()
    file.close()
    read = load_file(tmp_path / "out.safetensors")
    expected = {name: tensor for part in parts for name, tensor in part.items()}
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert (
            torch.equal(read[name].view(torch.uint8), tensor.view(torch.uint8))
            if tensor.dim()
            else read[name] == 3
        )
    with safe_open(tmp_path / "out.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
