"""What stands in the place of a decoder layer, so that what is around it can run without its weights."""

from typing import Any

from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional ones, and keywords


class StandIn(nn.Module):
    """Gives what it is given, or what it is told to give, in a tuple of `outputs` where the layer gives one.

    Its attributes are the layer's. `hidden` are the hidden states that it was called with, `called` all else.
    """

    def __init__(self, layer: nn.Module, outputs: int = 0) -> None:
        super().__init__()
        self.__dict__["_layer"], self.outputs = layer, outputs
        self.called: Arguments = (), {}
        self.hidden: Tensor | None = None
        self.gives: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.called = apart(args, kwargs)
        gives = self.hidden if self.gives is None else self.gives
        return (gives, *[None] * (self.outputs - 1)) if self.outputs else gives


def apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """The hidden states that a layer is called with, and all else."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], (
        (),
        {name: value for name, value in kwargs.items() if name != "hidden_states"},
    )
