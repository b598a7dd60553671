"""What linears are for in a layer: seen by what changes when what they give is changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit_quantize.model.discovery.probe import Change, ProbedLayer, Seen, same_tensor
from lowbit_quantize.model.hooks import without_attention

TOKEN = 3  # of the first sequence, whose outputs are changed


@dataclass(frozen=True)
class Attention:
    """The module that computes attention, the linear that reads what it gives, and the length of the tuple that the
    module gives (0: no tuple); empty where there is none.
    """

    module: str = ""
    end: str = ""
    outputs: int = 0


def attention_of(layer: ProbedLayer) -> Attention:
    """Found by what calls attention, and what comes next in it."""
    seen = layer.base
    if not seen.attention:
        return Attention()
    inside = [name for name in seen.order[seen.before_attention :] if name.startswith(f"{seen.attention}.")]
    linears = (name for name in inside if isinstance(layer.module.get_submodule(name), nn.Linear))
    return Attention(seen.attention, next(linears, ""), seen.tuples[seen.attention])


def stages_of(layer: ProbedLayer, groups: Sequence[Sequence[str]]) -> list[int]:
    """For each group of linears how many others come before it, one behind the other."""
    places = [layer.reads(group[0]) for group in groups]
    moved = []
    for group in groups:
        after = layer.run(changes=_noise(layer, group))
        moved.append([_differs(layer.base, after, place) for place in places])
    count = len(groups)
    before = [[a for a in range(count) if a != b and moved[a][b] and not moved[b][a]] for b in range(count)]
    depth: dict[int, int] = {}

    def depth_of(one: int) -> int:
        if one not in depth:
            depth[one] = 1 + max((depth_of(other) for other in before[one]), default=-1)
        return depth[one]

    return [depth_of(one) for one in range(count)]


def reaches_others(layer: ProbedLayer, group: Sequence[str]) -> bool:
    """Whether what linears give at one token changes the layer's output at others."""
    moved = layer.by_token(layer.run(changes=_noise(layer, group, TOKEN)).output - layer.base.output)
    others = torch.ones(moved.shape[1], dtype=torch.bool)
    others[TOKEN] = False
    return bool(moved[0, others].abs().max() > 1e-4 * layer.base.output.abs().mean())


def leaving(layer: ProbedLayer) -> tuple[str, ...]:
    """The linears whose outputs reach what the layer leaves for later ones."""
    if not layer.base.left:
        return ()
    linears = (name for name in layer.base.order if isinstance(layer.module.get_submodule(name), nn.Linear))
    return tuple(name for name in linears if _reaches_left(layer, name))


def _reaches_left(layer: ProbedLayer, linear: str) -> bool:
    left = layer.run(changes=_noise(layer, (linear,))).left
    return any(not _alike(one, other) for one, other in zip(layer.base.left, left, strict=True))


def residual_of(layer: ProbedLayer, linear: str) -> str:
    """The norm that reads the stream which a linear's output is added to as it is; empty where it is not so."""
    gave = layer.base.outputs.get(linear)
    if gave is None or gave.numel() != layer.hidden.numel():
        return ""
    norms = [name for name in layer.base.order if _is_norm(layer, name)]
    readers = [(name, layer.base.inputs[name]) for name in norms]
    streams = [inputs for _, inputs in readers] + [layer.base.output]
    for name, before in readers:
        for stream in streams:
            if before.numel() == gave.numel() == stream.numel() and _alike(
                before.reshape(-1) + gave.reshape(-1), stream.reshape(-1)
            ):
                return name
    return ""


def middle_of(layer: ProbedLayer, attention: Attention) -> str:
    """The module that reads all that the layer is after attention; empty where the rest needs more than that."""
    if not attention.end:
        return ""
    seen = layer.base
    after = seen.order[seen.order.index(attention.end) + 1 :]
    for name in after:
        read = seen.inputs[name]
        if name.startswith(f"{attention.module}.") or read.shape != layer.hidden.shape:
            continue
        with without_attention(layer.module, attention.module, attention.end, attention.outputs):
            rest = layer.run(hidden=read)
        if _alike(rest.output, seen.output):
            return name
    return ""


def closing_of(layer: ProbedLayer, middle: str) -> str:
    """The linear whose output, added to what the middle reads, is what the layer gives; empty where there is none."""
    seen = layer.base
    if not middle:
        return ""
    for name in reversed(seen.order):
        gave = seen.outputs.get(name)
        if gave is None or gave.numel() != seen.output.numel() or layer.expert_of(name):
            continue
        linear = isinstance(layer.module.get_submodule(name), nn.Linear)
        if linear and _alike(seen.inputs[middle].reshape(-1) + gave.reshape(-1), seen.output.reshape(-1)):
            return name
    return ""


def router_of(layer: ProbedLayer) -> tuple[str, str]:
    """The module that has a row of weights for each expert, and the one that reads what experts are called with: the
    same, or the experts where the block makes something else of its input for them. Empty where there is none.
    """
    if not layer.experts:
        return "", ""
    count = len(layer.module.get_submodule(layer.experts))  # type: ignore[arg-type]
    rows = [name for name in layer.base.order if not layer.expert_of(name) and _rows(layer, name) == count]
    read, block = layer.base.inputs[layer.experts], layer.experts.rpartition(".")[0]
    entrance = next((name for name in rows if same_tensor(layer.base.inputs[name], read)), "")
    inside = [name for name in rows if block and name.startswith(f"{block}.")]
    return (entrance, entrance) if entrance or len(inside) != 1 else (inside[0], layer.experts)


def _rows(layer: ProbedLayer, name: str) -> int:
    weight = layer.own_weight(name)
    return len(weight) if weight is not None and weight.dim() == 2 else 0


def _is_norm(layer: ProbedLayer, name: str) -> bool:
    weight = layer.own_weight(name)
    return weight is not None and weight.dim() == 1 and layer.base.inputs[name].shape == layer.hidden.shape


def _noise(layer: ProbedLayer, group: Sequence[str], token: int | None = None) -> Mapping[str, Change]:
    def add(gave: Tensor) -> Tensor:
        noise = 0.5 * gave.std() * torch.randn(gave.shape, generator=torch.Generator().manual_seed(1))
        if token is not None:  # of the first sequence
            only = torch.zeros(gave.shape[:-1])
            only.view(-1)[token] = 1
            noise *= only.unsqueeze(-1)
        return gave + noise

    return dict.fromkeys(group, add)


def _differs(one: Seen, other: Seen, place: str) -> bool:
    if place not in one.inputs or place not in other.inputs:
        return False
    before, after = one.inputs[place], other.inputs[place]
    return before.shape != after.shape or not _alike(before, after)


def _alike(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 + 1e-5 * other.abs().max())
