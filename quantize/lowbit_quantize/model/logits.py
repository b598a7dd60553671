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

    def slope(self, logits: Tensor) -> Tensor | None:
        """How logits change with what a head gives, where they are `logits`: (…, words), None where that is one."""
        if self.cap is None:
            return None if self.factor == 1 else logits.new_full((), self.factor)
        return (1 - (logits / self.cap).square()).mul_(self.factor)


PLAIN = LogitsForm()
