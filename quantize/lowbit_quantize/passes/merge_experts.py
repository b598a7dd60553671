"""Expert merging: what pruning would drop is averaged into the nearest experts that stay.

The dominant experts are those that a criterion keeps (prune_experts.py). Every other is absorbed by the nearest of
them in its routing group, as M-SMoE (Li et al. 2023, arXiv 2310.01334) and HC-SMoE (Chen et al. 2024, arXiv
2410.08589) measure it (statistics/expert_similarity.py), and their weights are averaged. An expert counts for its
routing frequency times what a token gets of it, Σ gate · ‖output‖ over its tokens: the frequency of M-SMoE and the
saliency by which REAM weighs (Jha et al. 2026, arXiv 2604.04356) in one, which lost less than either.

Neurons of a gated network may stand in any order: `permute` first brings an absorbed expert's into that of the
dominant one's, by the linear assignment that makes their weights and what they give on a sample of tokens nearest
(Git Re-Basin, Ainsworth et al. 2022, arXiv 2209.04836; both together as in REAM).

Super-experts stand alone: they are not absorbed and absorb nobody, since an average loses what is extreme in them.

The router keeps the dominant experts' rows. The absorbed ones' mass cannot be kept: what would send it to the group is
the logarithm of a sum of exponentials, which is not linear in the router's input; and averaged rows lost more.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lowbit_quantize.model.experts.linears import Experts

Consolidation = Literal["average", "permute"]
LAST = "down_proj."  # the linear that reads an expert's middle neurons; other parameters have a row for each
ALIGNMENT_TOKENS = 512


def absorbers(nearness: Tensor, kept: Tensor, alone: Tensor, groups: int) -> dict[int, int]:
    """Which of the kept experts absorbs each that goes: the nearest in its group; none where all there are `alone`.

    `nearness` is (experts, experts), `alone` (experts,) bool; groups are of equal size, one after the other.
    """
    size, staying, near_to = len(nearness) // groups, set(kept.tolist()), nearness.tolist()
    open_to = [expert for expert in sorted(staying) if not alone[expert]]
    found = {}
    for gone in range(len(nearness)):
        near = [expert for expert in open_to if expert // size == gone // size]
        if gone not in staying and not alone[gone] and near:
            found[gone] = max(near, key=near_to[gone].__getitem__)
    return found


def merge_experts(
    experts: Experts | Sequence[nn.Module],
    absorbed_by: Mapping[int, int],
    weights: Tensor,
    inputs: Tensor | None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The parameters of each expert that absorbs others, with its number; they may be loaded before the next are made.

    `weights` (experts,) are those of the averages; with `inputs` (tokens, hidden) experts are aligned.
    """
    if inputs is not None:
        inputs = inputs[:: -(-len(inputs) // ALIGNMENT_TOKENS)]
    for dominant in sorted(set(absorbed_by.values())):
        group = [dominant, *(gone for gone, by in absorbed_by.items() if by == dominant)]
        yield dominant, averaged([experts[one] for one in group], weights[group].tolist(), inputs)


def averaged(
    group: Sequence[nn.Module], weights: Sequence[float], inputs: Tensor | None
) -> dict[str, Tensor]:
    """The average of a group's parameters, in their dtypes; its first expert is the dominant one, and alone without
    weights.
    """
    dominant, total = group[0], sum(weights)
    shares = [weight / total for weight in weights] if total else [1.0] + [0.0] * (len(group) - 1)
    sums = {name: value.float() * shares[0] for name, value in dominant.named_parameters()}
    for expert, share in zip(group[1:], shares[1:], strict=True):
        order = None if inputs is None else matching(dominant, expert, inputs)
        for name, value in expert.named_parameters():
            sums[name] += reordered(name, value.float(), order) * share
    return {name: sums[name].to(value.dtype) for name, value in dominant.named_parameters()}


def reordered(name: str, value: Tensor, order: Tensor | None) -> Tensor:
    """An expert's parameter with its middle neurons in another order."""
    if order is None:
        return value
    if name.startswith(LAST):
        return value[:, order] if value.dim() == 2 else value  # the last linear's bias is of the output
    return value[order]


def matching(dominant: nn.Module, expert: nn.Module, inputs: Tensor) -> Tensor:
    """Which of an expert's middle neurons stands for each of the dominant one's, (intermediate,).

    The sum of two distances is least, each relative to its mean: of the weights of two neurons, and of what they give
    for `inputs`.
    """
    cost = _distances(_weights(dominant), _weights(expert)) + _distances(
        _given(dominant, inputs), _given(expert, inputs)
    )
    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(inputs.device)


def _weights(expert: nn.Module) -> Tensor:
    """What belongs to each middle neuron, (intermediate, parameters)."""
    parts = []
    for name, value in expert.named_parameters():
        if name.startswith(LAST):
            parts += [value.T] if value.dim() == 2 else []
        else:
            parts.append(value if value.dim() == 2 else value.unsqueeze(1))
    return torch.cat(parts, dim=1).float()


def _given(expert: Any, inputs: Tensor) -> Tensor:
    """What each middle neuron gives, (intermediate, tokens)."""
    with torch.no_grad():
        given: Tensor = expert.middle(inputs)
    return given.T.float()


def _distances(first: Tensor, second: Tensor) -> Tensor:
    distances = torch.cdist(first, second)
    return distances / distances.mean().clamp(min=1e-20)
