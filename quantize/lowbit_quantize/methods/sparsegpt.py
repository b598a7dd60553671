"""SparseGPT: weights become zero from input to input, and those to come make up for what is lost.

Frantar and Alistarh 2023, arXiv 2301.00774. As in `gptq.py` the factor L of H = L Lᵀ is worked on from the last inputs
to the first: a row that is off by d costs |d L|², and what is chosen for some inputs g leaves r = d L_g to be made up
for by those before them, for which w + r L_gg⁻¹ is then the weight to be. With G = (L_gg L_ggᵀ)⁻¹, setting those in P
to zero costs w_P (G_PP)⁻¹ w_Pᵀ once all others have moved by −w_P (G_PP)⁻¹ G_P (optimal brain surgeon, Hassibi and
Stork 1993).

What is done otherwise than in the paper: of every four inputs each of the six masks is tried by its whole cost, and
not by the sum of what each weight costs alone; groups of inputs that matter most come first, while most inputs are left
to help, as in GPTQ's activation order; and once the mask is fixed, each row is solved for on it (`solve_on_mask`): the
paper's pass leaves the inputs that came first as they were chosen. As the method's `needs` say, the weight aimed at is
the one that makes up for earlier errors (statistics/error_compensation.py).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lowbit_quantize.methods.gptq import ordered_factor
from lowbit_quantize.methods.method import Need
from lowbit_quantize.methods.pruner import Pruned, Pruner, by_rows
from lowbit_quantize.methods.sparsity import (
    PRUNE_BLOCK,
    SOLVE_STEPS,
    NofM,
    Sparsity,
    largest,
    ridged,
    solve_on_mask,
)

# Of weights wanted of some inputs, (n, rows, inputs): what is kept of them, and the numbers that it then has.
ChooseMask = Callable[[Tensor], tuple[Tensor, Tensor]]


class SparseGpt(Pruner):
    """The mask that costs least once the other weights have moved, and the least squares on it."""

    name = "sparsegpt"
    needs: frozenset[Need] = frozenset({"hessian", "base_stream"})
    products = SOLVE_STEPS + 1

    def stack(self, weight: Tensor, hessian: Tensor) -> Pruned:
        together = self.sparsity.of if isinstance(self.sparsity, NofM) else weight.shape[-1]
        order, lower = ordered_factor(hessian, together)
        back, solvable = order.argsort(1), ridged(hessian)

        def work(rows: Tensor) -> Pruned:
            mask, start = (
                _columns(found, back) for found in obs_mask(_columns(rows, order), lower, self.sparsity)
            )
            return Pruned(solve_on_mask(rows, solvable, mask, start), mask)

        return by_rows(weight, work)


def obs_mask(wanted: Tensor, lower: Tensor, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
    """The mask of rows (n, rows, in), and their weights as the pass from the last input to the first leaves them.

    `lower` is the factor of the Hessians, (n, in, in), in the order in which the columns lie.
    """
    inputs = wanted.shape[-1]
    width = sparsity.of if isinstance(sparsity, NofM) else PRUNE_BLOCK
    mask, found = torch.empty_like(wanted, dtype=torch.bool), torch.empty_like(wanted)
    owed = torch.zeros_like(wanted)  # r, of all inputs that are left
    for stop in range(inputs, 0, -PRUNE_BLOCK):
        outer = slice(max(0, stop - PRUNE_BLOCK), stop)
        for part, inverse, choose in _parts(lower, outer, width, sparsity):
            aim = wanted[..., part] + torch.bmm(owed[..., part], inverse)
            mask[..., part], found[..., part] = choose(aim)
            rest = slice(outer.start, part.start)
            off = wanted[..., part] - found[..., part]
            owed[..., rest].baddbmm_(off, lower[:, part, rest])
        off = wanted[..., outer] - found[..., outer]
        owed[..., : outer.start].baddbmm_(off, lower[:, outer, : outer.start])
    return mask, found


def _parts(
    lower: Tensor, outer: slice, width: int, sparsity: Sparsity
) -> Iterator[tuple[slice, Tensor, ChooseMask]]:
    """The inputs that are chosen together, from the last on: where, L_gg⁻¹ (n, width, width), and what chooses."""
    for stop in range(outer.stop, outer.start, -width):
        part = slice(max(outer.start, stop - width), stop)
        corner = lower[:, part, part]
        unit = torch.eye(part.stop - part.start, device=lower.device, dtype=lower.dtype)
        inverse = torch.linalg.solve_triangular(corner, unit.expand_as(corner), upper=False)
        if isinstance(sparsity, NofM):
            yield part, inverse, _least_of_all(inverse.mT @ inverse, sparsity)
        else:
            count = sparsity.kept(part.start, part.stop)
            yield part, inverse, _least_by_one(corner @ corner.mT, inverse, count)


def _least_of_all(freedom: Tensor, sparsity: NofM) -> ChooseMask:
    """Tries every mask; `freedom` is G, (n, of, of)."""
    masks = sparsity.sets().to(freedom.device)  # (masks, of)
    gone = [torch.nonzero(~one).flatten() for one in masks]
    costs, moves = [], []
    unit = torch.eye(sparsity.of, device=freedom.device, dtype=freedom.dtype)
    for one in gone:
        inner = torch.linalg.inv(freedom[:, one][:, :, one])
        move = torch.zeros_like(freedom)
        move[:, one] = inner @ freedom[:, one]  # what all columns move by for each of P
        cost = torch.zeros_like(freedom)
        cost[:, one.unsqueeze(1), one] = inner
        costs.append(cost)
        moves.append(unit - move)
    cost, move = torch.stack(costs, 1), torch.stack(moves, 1)  # (n, masks, of, of)

    def choose(aim: Tensor) -> tuple[Tensor, Tensor]:
        turned = aim.unsqueeze(1)  # (n, 1, rows, of)
        best = ((turned @ cost) * turned).sum(-1).argmin(1)  # (n, rows)
        mask = masks[best]
        moved = (turned @ move).gather(1, best[:, None, :, None].expand(-1, 1, -1, aim.shape[-1]))
        return mask, moved.squeeze(1) * mask

    return choose


def _least_by_one(metric: Tensor, inverse: Tensor, count: int) -> ChooseMask:
    """Keeps, of each row, the `count` that cost most by themselves; `metric` is L_gg L_ggᵀ, `inverse` L_gg⁻¹."""
    freedom = inverse.square().sum(1).unsqueeze(1)  # diagonal of G, (n, 1, width)

    def choose(aim: Tensor) -> tuple[Tensor, Tensor]:
        mask = largest(aim.square() / freedom, count)
        return mask, solve_on_mask(aim, metric, mask)

    return choose


def _columns(rows: Tensor, order: Tensor) -> Tensor:
    """Columns of each of (n, rows, in) in an order (n, in)."""
    return torch.stack([one[:, places] for one, places in zip(rows, order, strict=True)])
