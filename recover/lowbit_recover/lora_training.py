"""A model with an adapter on its way down an objective: steps, held-out loss, the best state kept."""

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_core.errors import NumericsError
from lowbit_core.log import get_logger
from lowbit_core.progress import track
from lowbit_evaluate.loaded_model import LoadedModel
from lowbit_recover import lora_state as saved
from lowbit_recover.lora_examples import Batch, Example, batches
from lowbit_recover.lora_model import adapt, trained
from lowbit_recover.lora_objectives import AnswerLoss, Divergence, Objective, Predictor
from lowbit_recover.lora_state import BEST, NOW, Curve, State

log = get_logger("recover")

WARM_UP = 0.05  # of all steps
CLIPPED = 1.0  # the gradient's norm


@dataclass(frozen=True)
class Settings:
    """What decides the adapter, beside the model and the data."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all-linear",)
    epochs: float = 3.0
    rate: float = 2e-4
    batch_size: int = 8
    max_seq_length: int = 512
    num_samples: int = 256
    seed: int = 0
    evaluations: int = 6
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Data:
    """Examples to train on and held-out ones; both are in memory."""

    training: Sequence[Example]
    heldout: Sequence[Example]

    @property
    def tokens(self) -> int:
        """That count, of the training examples."""
        return sum(sum(one.counts) for one in self.training)


class Training:
    """A model with its adapter, what it is trained to lower, and the steps."""

    def __init__(
        self,
        settings: Settings,
        out: Path,
        model: LoadedModel,
        teacher: LoadedModel | None,
        targets: Sequence[str],
        data: Data,
    ) -> None:
        self._settings, self._out, self._data = settings, out, data
        self.adapted = adapt(model.model, targets, settings.rank, settings.alpha, settings.seed)
        if settings.gradient_checkpointing:
            model.model.enable_input_require_grads()
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.adapted.train()
        ours = Predictor(model.model, model.logits)
        self.objective: Objective = AnswerLoss(ours)
        if teacher is not None:
            self.objective = Divergence(ours, Predictor(teacher.model, teacher.logits))
        self._trained = trained(self.adapted)
        tokenizer = model.tokenizer
        self._padding = next(
            (one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0
        )
        self._optimizer = torch.optim.AdamW(self._trained.values(), lr=settings.rate, weight_decay=0.0)
        self._per_epoch = -(-len(data.training) // settings.batch_size)
        self.steps = max(1, math.ceil(settings.epochs * self._per_epoch))

    @property
    def numbers(self) -> int:
        """That are trained."""
        return sum(one.numel() for one in self._trained.values())

    def run(self, identity: Mapping[str, Any], state: State | None) -> State:
        """All steps that are not done yet; saved after each evaluation."""
        state = self._taken_up(state) if state else State(identity, 0, Curve(), {})
        began, before = (time.monotonic(), time.process_time()), (state.seconds, state.cpu_seconds)
        every = max(1, -(-self.steps // self._settings.evaluations))
        if not state.curve.heldout:
            self._evaluate(state)
            saved.save(self._out, state)
        batches_left = self._batches(state.step)
        for _ in track(range(state.step, self.steps), self.steps, "steps", done=state.step):
            state.curve.training.append(self._step(next(batches_left), state.step))
            state.step += 1
            if state.step % every == 0 or state.step == self.steps:
                self._evaluate(state)
                state.seconds = before[0] + time.monotonic() - began[0]
                state.cpu_seconds = before[1] + time.process_time() - began[1]
                saved.save(self._out, state)
        return state

    def _step(self, batch: Batch, step: int) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.rate * schedule(step, self.steps)
        with torch.enable_grad():
            total, count = self.objective(batch)
            loss = total / max(1, count)
        if not torch.isfinite(loss):
            raise NumericsError(
                f"the loss of step {step + 1} is not a finite number; lower --rate (now {self._settings.rate:g}) and "
                "give --overwrite, or run the same command to go on after the last step that was saved"
            )
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained.values(), CLIPPED)
        self._optimizer.step()
        return float(loss.detach())

    def _evaluate(self, state: State) -> None:
        """Note the held-out loss, and keep what is trained where none was lower."""
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in batches(self._data.heldout, self._settings.batch_size, self._padding):
                some, number = self.objective(batch)
                total, count = total + float(some), count + number
        loss, best = total / count, state.curve.best
        if not math.isfinite(loss):
            raise NumericsError(
                f"the held-out loss after step {state.step} is not a finite number; lower --rate"
            )
        state.curve.heldout[state.step] = loss
        state.tensors = {NOW: self._copies(), **saved.adam_state(self._optimizer, self._trained)} | {
            BEST: self._copies() if loss < best else state.tensors[BEST]
        }
        log.info("step %d of %d: held-out %s: %.4f%s", state.step, self.steps, self.objective.name, loss,
                 ", the lowest so far" if loss < best else "")  # fmt: skip

    def _copies(self) -> dict[str, Tensor]:
        return {name: one.detach().clone() for name, one in self._trained.items()}

    def _taken_up(self, state: State) -> State:
        with torch.no_grad():
            for name, one in self._trained.items():
                one.copy_(state.tensors[NOW][name])
        saved.restore_adam(self._optimizer, self._trained, state)
        log.info("going on after %d of %d steps", state.step, self.steps)
        return state

    def _batches(self, done: int) -> Iterator[Batch]:
        """Batches without end, an epoch in an order of its own, but for the first `done`."""
        epoch, size = done // self._per_epoch, self._settings.batch_size
        skipped = done % self._per_epoch
        while True:
            order = random.Random(f"{self._settings.seed}/{epoch}")
            for number, batch in enumerate(batches(self._data.training, size, self._padding, order)):
                if number >= skipped:
                    yield batch
            epoch, skipped = epoch + 1, 0


def schedule(step: int, steps: int) -> float:
    """The share of the rate: up in the first steps, then down along a cosine (Loshchilov 2016, arXiv 1608.03983)."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
