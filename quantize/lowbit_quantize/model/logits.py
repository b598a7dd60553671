"""What a model makes of what its head gives."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogitsForm:
    """Logits are `factor` times what the head gives, and `cap` · tanh(logit / cap) of that where there is a cap."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Of (…, words); may be done in place."""
        if self.factor != 1:
            logits = logits.mul_(self.factor)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)


PLAIN = LogitsForm()
