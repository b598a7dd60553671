"""Which weights of a linear may be other than zero, and the best numbers that these can have.

Two patterns: N:M, of every M inputs in turn at most N are not zero (2:4 is what sparse tensor cores multiply), and a
ratio, which each output has of its inputs set to zero. Outputs do not meet, so that rows may be pruned in any blocks.

`solve_on_mask` is what is left to do once a mask is fixed: the row x on its mask that minimizes (x − t) H (x − t)ᵀ, the
least squares that ALPS (Meng et al. 2024, arXiv 2406.07831) ends with, by conjugate gradients on all rows at once.
"""

import re
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

N_OF_M = ("2:4", "4:8")
PRUNE_BLOCK = 128  # inputs whose mask is chosen together where only a ratio is asked for
RIDGE = 0.01  # of the mean of diag H: pulls towards the target, and bounds what the solve may fit to one text
SOLVE_STEPS = 32
TOLERANCE = 1e-4  # of the gradient that a row starts with, in the preconditioner's norm


@dataclass(frozen=True)
class NofM:
    """At most `kept` of every `of` inputs are not zero."""

    kept: int
    of: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @property
    def zeros(self) -> float:
        """The share of weights that are zero, at least."""
        return 1 - self.kept / self.of

    def misfit(self, inputs: int) -> str | None:
        """Why a linear with so many inputs cannot have the pattern; None where it can."""
        return f"they are no multiple of {self.of}" if inputs % self.of else None

    def mask(self, scores: Tensor) -> Tensor:
        """What is kept of weights (…, out, in): of every few inputs those with the largest scores."""
        return largest(scores.unflatten(-1, (-1, self.of)), self.kept).flatten(-2)

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight (out, in) has the pattern."""
        return bool(((weight != 0).unflatten(-1, (-1, self.of)).sum(-1) <= self.kept).all())

    def sets(self) -> Tensor:
        """Every mask that a few inputs can have, (masks, of)."""
        masks = torch.zeros(0, self.of, dtype=torch.bool)
        for places in combinations(range(self.of), self.kept):
            one = torch.zeros(1, self.of, dtype=torch.bool)
            one[0, list(places)] = True
            masks = torch.cat([masks, one])
        return masks


@dataclass(frozen=True)
class Ratio:
    """Each output has this share of its inputs set to zero, rounded to whole weights."""

    zeros: float

    def __str__(self) -> str:
        return f"{self.zeros:g}"

    def misfit(self, inputs: int) -> str | None:
        """Why a linear with so many inputs cannot have the pattern; None where it can."""
        return None

    def mask(self, scores: Tensor) -> Tensor:
        """What is kept of weights (…, out, in): of each row those with the largest scores."""
        return largest(scores, self.kept(0, scores.shape[-1]))

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight (out, in) has as many zeros."""
        return bool(((weight != 0).sum(-1) <= self.kept(0, weight.shape[-1])).all())

    def kept(self, start: int, stop: int) -> int:
        """How many of some inputs of a row are kept: parts of a row add up to the row."""
        return (stop - start) - (round(self.zeros * stop) - round(self.zeros * start))


Sparsity = NofM | Ratio


def sparsity_of(given: object) -> Sparsity:
    """`2:4`, `4:8`, or the share of weights that become zero; raises ValueError."""
    if isinstance(given, str) and given in N_OF_M:
        kept, of = map(int, given.split(":"))
        return NofM(kept, of)
    text = str(given)
    if not isinstance(given, bool) and re.fullmatch(r"0?\.\d+(e-\d+)?", text) and 0 < float(text) < 1:
        return Ratio(float(text))
    raise ValueError(
        f"allowed are {', '.join(N_OF_M)} (of every four inputs two are kept), and a ratio of zeros between 0 and 1"
    )


def largest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest of the last axis are; of equals those that come first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def ridged(hessian: Tensor) -> Tensor:
    """Hessians (n, in, in) with the ridge that the solve has."""
    found = hessian.clone()
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    diagonal += RIDGE * diagonal.mean(-1, keepdim=True).clamp(min=1e-12)
    return found


def solve_on_mask(
    target: Tensor, hessian: Tensor, mask: Tensor, start: Tensor | None = None, steps: int = SOLVE_STEPS
) -> Tensor:
    """The weights x, zero off `mask`, that minimize (x − target) H (x − target)ᵀ for each row: (n, out, in).

    `hessian` (n, in, in) is positive definite (`ridged`); `start` is where the search begins. A row that has
    converged stays as it is, so that it does not matter which rows are solved together. No step raises a row's error.
    """
    keep = mask.to(target.dtype)
    found = torch.zeros_like(target) if start is None else start * keep
    weights = keep / hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)  # Jacobi's preconditioner
    left = torch.bmm(target - found, hessian).mul_(keep)
    ahead = left * weights
    size = (left * ahead).sum(-1, keepdim=True)  # (n, out, 1)
    enough = size * TOLERANCE**2
    for _ in range(steps):
        moving = size > enough
        if not moving.any():
            break
        turned = torch.bmm(ahead, hessian).mul_(keep)
        curvature = (ahead * turned).sum(-1, keepdim=True)
        step = torch.where(moving & (curvature > 0), size / curvature.clamp(min=1e-30), 0.0)
        found.addcmul_(step, ahead)
        left.addcmul_(step, turned, value=-1)
        conditioned = left * weights
        now = (left * conditioned).sum(-1, keepdim=True)
        ahead = conditioned.addcmul_(torch.where(moving, now / size.clamp(min=1e-30), 0.0), ahead)
        size = torch.where(moving, now, size)
    return found
