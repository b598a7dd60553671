"""What stands in the place of a decoder layer, so that what is around it can run without its weights."""

from typing import Any

from torch import Tensor, nn


class StandIn(nn.Module):
    """Gives what it is given, in a tuple of `outputs` where the layer gives one; its attributes are the layer's.

    `called` has what it was called with, hidden states apart: positional arguments and keywords.
    """

    def __init__(self, layer: nn.Module, outputs: int = 0) -> None:
        super().__init__()
        self.__dict__["_layer"], self.outputs = layer, outputs
        self.called: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, self.called = apart(args, kwargs)
        return (hidden, *[None] * (self.outputs - 1)) if self.outputs else hidden


def apart(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The hidden states that a layer is called with, and all else."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], (
        (),
        {name: value for name, value in kwargs.items() if name != "hidden_states"},
    )
