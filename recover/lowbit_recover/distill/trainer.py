"""The loop: rows in an order by the seed, gradients summed over a batch, AdamW, and a judge that stops it.

A step is a pure function of the step before, of the settings and of the rows, so that a run which goes on from a saved
step has the curve of one that was never stopped. Ranks are dealt the parts of a batch, and every rank adds their
gradients up in the order of the parts, so that several ranks train what one does, to the last bit. No library's trainer
is used: there is one model, one loss that reads a cache, and a state that must be written whole; what remains is a
loop. Every trained tensor takes steps of a share of its own root mean square (the learning rate of each is that times
the one that is given), because scales, norms and matrices differ by orders of magnitude.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowbit_core.errors import NumericsError
from lowbit_core.log import get_logger
from lowbit_core.progress import track
from lowbit_quantize.device import ranks
from lowbit_quantize.device.precision import exact_products
from lowbit_recover.distill.losses import Soft, hidden_loss, token_loss
from lowbit_recover.distill.moments import put_on_disk
from lowbit_recover.distill.settings import Settings
from lowbit_recover.distill.state import BEST, LAST, TrainingDirectory
from lowbit_recover.distill.teacher import Cache, formed
from lowbit_recover.distill.trainee import Trainee

log = get_logger("distill")

POSITIONS_AT_ONCE = 256  # whose logits are in memory
LEAST_RATE = 0.1  # of the learning rate, at the last step
BETAS = (0.9, 0.99)
Judge = Callable[[], float]  # mean KL of the set-aside rows, in nats


@dataclass
class Progress:
    """Where a training is: steps done, the best, and its curve: (step, mean KL on set-aside rows, mean loss since).

    `earlier_s` and `earlier_cpu_s` are what processes before this one have trained.
    """

    step: int = 0
    curve: list[tuple[int, float, float | None]] = field(default_factory=list)
    best_step: int = 0
    best: float = math.inf
    waited: int = 0
    losses: list[float] = field(default_factory=list)
    earlier_s: float = 0.0
    earlier_cpu_s: float = 0.0


class Trainer:
    """One training. `rows` are token ids (rows, tokens), `teacher` is None where only the text teaches."""

    def __init__(
        self, trainee: Trainee, settings: Settings, rows: Tensor, teacher: Cache | None, judge: Judge,
        directory: TrainingDirectory, *, moments: Path | None = None,
    ) -> None:  # fmt: skip
        """`moments` is a folder that holds the optimizer's state, where memory is not to."""
        self._trainee, self._settings, self._rows = trainee, settings, rows
        self._teacher, self._judge, self._directory = teacher, judge, directory
        self.steps = steps_of(len(rows), settings)
        groups: list[dict[str, Any]] = [
            {"params": [one], "lr": settings.learning_rate * _size(one)} for one in trainee.trained.values()
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
        self._moments, self._begun = moments, (time.monotonic(), time.process_time())
        self._rates = [group["lr"] for group in groups]
        self.progress = Progress()

    def run(self) -> Progress:
        """Train to the end or until nothing is gained; the best parameters are the trainee's then."""
        self._resume()
        if self._moments is not None:
            put_on_disk(self._optimizer, self._moments)
        progress, settings = self.progress, self._settings
        if not progress.curve:
            self._evaluate()
        left = range(progress.step, self.steps)
        for step in track(left, self.steps, "distill", progress.step, said=self._said):
            if progress.waited >= settings.patience:
                break
            progress.losses.append(self._step(step))
            progress.step = step + 1
            if progress.step % settings.evaluate_every == 0 or progress.step == self.steps:
                self._evaluate()
        if ranks.is_first():
            best = self._directory.load(BEST)
            assert best is not None, "the first evaluation is the best so far"
            self._trainee.take(best["parameters"])
        return progress

    def _said(self) -> str:
        """What the progress says beside the step."""
        return f"set-aside KL {self.progress.curve[-1][1]:.4f}, best {self.progress.best:.4f}"

    def _step(self, step: int) -> float:
        """One step on one batch; the mean loss of its tokens."""
        settings = self._settings
        rate = _rate(step, self.steps, settings.warmup)
        for group, full in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = full * rate
        self._optimizer.zero_grad(set_to_none=True)
        total = self._gradients(batch_of(step, len(self._rows), settings))
        if not math.isfinite(total):
            raise NumericsError(
                f"the loss of step {step + 1} is {total}; lower --learning-rate (now {settings.learning_rate:g}) and "
                "run it again with --overwrite, or give --precision float32"
            )
        self._optimizer.step()
        return total

    def _gradients(self, batch: Tensor) -> float:
        """Those of a batch, added up part by part, and its mean loss."""
        parts, count, losses = batch.split(self._settings.micro_batch), ranks.count(), list[float]()
        if count > 1:
            for first in range(0, len(parts), count):
                losses += self._dealt(parts[first : first + count], len(batch))
            return math.fsum(losses)
        for rows in parts:
            loss = self._loss(rows) * (len(rows) / len(batch))
            loss.backward()
            losses.append(float(loss.detach()))
        return math.fsum(losses)

    def _dealt(self, parts: Sequence[Tensor], batch: int) -> list[float]:
        """The losses of one part for each rank, or fewer; all ranks add all gradients up in the order of the parts."""
        trained, losses = list(self._trainee.trained.values()), list[float]()
        mine: tuple[float, Sequence[Tensor | None]] = (0.0, ())
        if ranks.rank() < len(parts):
            rows = parts[ranks.rank()]
            loss = self._loss(rows) * (len(rows) / batch)
            mine = float(loss.detach()), torch.autograd.grad(loss, trained, allow_unused=True)
        for source in range(len(parts)):
            loss_of_part, gradients = ranks.exchange(mine, source, self._trainee.device)
            losses.append(loss_of_part)
            for one, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    one.grad = gradient if one.grad is None else one.grad.add_(gradient)
        return losses

    def _loss(self, rows: Tensor) -> Tensor:
        """The mean loss over the positions of some rows."""
        settings, trainee, teacher = self._settings, self._trainee, self._teacher
        ids = self._rows[rows]
        states = trainee.hidden(ids)[:, :-1].flatten(0, 1)  # (positions, hidden)
        targets, head = ids[:, 1:].flatten(), trainee.head
        soft = teacher.soft(rows) if teacher is not None and settings.alpha < 1 else None
        total = states.new_zeros((), dtype=torch.float32)
        for start in range(0, len(states), POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            known = None
            if soft is not None:
                known = (soft.words[part], soft.log_probabilities[part], soft.rest[part])
            total = total + checkpoint(
                self._sum, states[part], head, known, targets[part], use_reentrant=False
            )
        loss = total / len(states)
        aim = teacher.states(rows) if teacher is not None and settings.hidden else None
        if aim is not None:
            loss = loss + settings.hidden * hidden_loss(states, aim.to(states.device))
        return loss

    def _sum(
        self, states: Tensor, head: Tensor, known: tuple[Tensor, Tensor, Tensor] | None, targets: Tensor
    ) -> Tensor:
        device = states.device
        exact = torch.bfloat16 if self._trainee.precision == "bf16" else torch.float32
        with exact_products(exact):
            product = states.float() @ head.float().T
        logits = formed(self._trainee.architecture.logits, product)
        soft = Soft(*(one.to(device) for one in known)) if known is not None else None
        settings = self._settings
        return token_loss(logits, soft, targets.to(device), settings.temperature, settings.alpha).sum()

    def _evaluate(self) -> None:
        """Judge this step, keep it if it is the best, and save where the run is; the first rank does, for all."""
        progress = self.progress
        judged = ranks.by_first(self._judge)
        if not math.isfinite(judged):
            raise NumericsError(
                f"the KL of the set-aside rows is {judged} after step {progress.step}; lower --learning-rate (now "
                f"{self._settings.learning_rate:g}) and run it again with --overwrite"
            )
        loss = sum(progress.losses) / len(progress.losses) if progress.losses else None
        progress.losses.clear()
        progress.curve.append((progress.step, judged, loss))
        progress.waited += 1
        if judged < progress.best:
            progress.best, progress.best_step, progress.waited = judged, progress.step, 0
        if ranks.is_first():
            self._save()

    def _save(self) -> None:
        progress = self.progress
        if progress.best_step == progress.step:
            self._directory.save(BEST, {"parameters": self._trainee.parameters()})
        self._directory.save(
            LAST,
            {
                "progress": {
                    **vars(progress),
                    "curve": [list(one) for one in progress.curve],
                    "earlier_s": progress.earlier_s + time.monotonic() - self._begun[0],
                    "earlier_cpu_s": progress.earlier_cpu_s + time.process_time() - self._begun[1],
                },
                "parameters": self._trainee.parameters(),
                "optimizer": self._optimizer.state_dict(),
            },
        )

    def _resume(self) -> None:
        saved = ranks.by_first(lambda: self._directory.load(LAST))
        if saved is None:
            return
        progress = Progress(**saved["progress"])
        progress.curve = [(step, kld, loss) for step, kld, loss in progress.curve]
        self.progress = progress
        self._trainee.take(saved["parameters"])
        self._optimizer.load_state_dict(saved["optimizer"])
        log.info("going on after step %d of %d", progress.step, self.steps)


def steps_of(rows: int, settings: Settings) -> int:
    """Steps of a training on so many rows: whole batches, over all epochs."""
    return rows * settings.epochs // settings.batch


def batch_of(step: int, rows: int, settings: Settings) -> Tensor:
    """The rows of a step: each epoch takes all in an order of its own, and a batch may reach into the next."""
    first = step * settings.batch
    return torch.tensor([_row(place, rows, settings.seed) for place in range(first, first + settings.batch)])


def _row(place: int, rows: int, seed: int) -> int:
    epoch, inner = divmod(place, rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return int(order[inner])


def _rate(step: int, steps: int, warmup: float) -> float:
    """A share of the learning rate: up along a line, then down along a cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def _size(parameter: Tensor) -> float:
    """Root mean square, and of a tensor of zeros one that does not stand still."""
    return float(parameter.detach().square().mean().sqrt()) or 1e-3
