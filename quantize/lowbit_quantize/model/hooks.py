"""Where a layer is looked into while it runs: what its modules read, its attention, and its KV cache."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

# Called with keys and values, (batch, heads, tokens, head_dim), after RoPE; gives what attention is to use instead.
KVCacheHook = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
InputObservers = Mapping[str, Callable[[Tensor], None]]
# Called with query and key, (batch, heads, tokens, head_dim), the mask and the factor of the logits.
AttentionObserver = Callable[[Tensor, Tensor, Tensor | None, float], None]

ATTENTION, EAGER_ATTENTION = "lowbit_sdpa", "lowbit_eager"
_attention_observer: ContextVar[AttentionObserver | None] = ContextVar("attention_observer", default=None)


class SeenAll(Exception):
    """All that was to be seen has been seen; nothing reads the rest of the layer."""


class PassedLayer:
    """A cache's layer for who asks how much it holds (sparse attention): of a whole text, what has just been passed."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def get_seq_length(self) -> int:
        return self.keys.shape[-2]


class PassedLayers(list[PassedLayer]):
    """No layers, though whichever is asked for is the one that is running."""

    running: PassedLayer

    def __getitem__(self, _: Any) -> Any:
        return self.running


class HookedCache(Cache):
    """A cache that keeps nothing: it passes keys and values through a hook."""

    def __init__(self, hook: KVCacheHook) -> None:
        super().__init__(layers=PassedLayers())
        self._hook = hook

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.layers.running = PassedLayer(key_states)
        return self._hook(key_states, value_states)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """A mixer beside attention (Falcon-H1) is given the same cache: a whole text has no state before it."""
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        return recurrent_states

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """The keys by which sparse attention chooses tokens stay as they are: engines keep them in a cache apart."""
        return indexer_key_states


@contextmanager
def removed_after(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are gone when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs_of(layer: nn.Module, observers: InputObservers, *, stop: bool = False) -> Iterator[None]:
    """Call `observers[name]` with the input, (tokens, features), of each named module while the layer runs.

    With `stop`, the last named module raises `SeenAll` instead of running.
    """

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            observers[name](inputs[0].reshape(-1, inputs[0].shape[-1]))
            if stop and name == list(observers)[-1]:
                raise SeenAll

        return hook

    handles = [layer.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in observers]
    with removed_after(handles):
        yield


class AttentionMeter(Protocol):
    """An observer that measures attention, and takes what was measured, here or elsewhere.

    `stop`: it needs no more of the layer then.
    """

    @property
    def stop(self) -> bool: ...
    def __call__(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, /) -> None: ...
    def measure(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor: ...
    def take(self, measured: Tensor) -> None: ...


def attention_observer() -> AttentionObserver | AttentionMeter | None:
    """Who looks at attention now."""
    return _attention_observer.get()


@contextmanager
def attention_observed_by(observer: AttentionObserver) -> Iterator[None]:
    """Call `observer` wherever a layer computes attention while the block runs, before it is computed."""
    token = _attention_observer.set(observer)
    try:
        yield
    finally:
        _attention_observer.reset(token)


def register_attention(*, eager: bool = False) -> str:
    """Make the name under which transformers finds attention that can be observed; returns it.

    `eager` is for families whose attention torch's `sdpa` does not compute (sinks, say).
    """
    AttentionInterface.register(ATTENTION, _observable_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    AttentionInterface.register(EAGER_ATTENTION, _observable_eager_attention)
    AttentionMaskInterface.register(EAGER_ATTENTION, eager_mask)
    return EAGER_ATTENTION if eager else ATTENTION


def _observable_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
) -> Any:
    """transformers' own `sdpa`, seen by the observer of the moment."""
    _observe_attention(query, key, mask, arguments)
    return sdpa_attention_forward(module, query, key, value, mask, **arguments)


def _observable_eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
) -> Any:
    """The family's own attention, which its file has beside the module, seen in the same way."""
    _observe_attention(query, key, mask, arguments)
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query, key, value, mask, **arguments)


def _observe_attention(query: Tensor, key: Tensor, mask: Tensor | None, arguments: Mapping[str, Any]) -> None:
    if observer := _attention_observer.get():
        observer(query, key, mask, arguments.get("scaling") or query.shape[-1] ** -0.5)


@contextmanager
def without_attention(
    layer: nn.Module, attention: str, end: str, outputs: int, read: Sequence[Tensor] = ()
) -> Iterator[None]:
    """While the block runs, attention is not computed: it adds what its last linear makes of `read`, or nothing.

    `read` has what that linear reads, (tokens, features), batch by batch. Where attention adds nothing, the layer takes
    what its middle reads. `outputs`: how long the tuple is that attention gives, 0 for none.
    """
    batches, last = iter(read), layer.get_submodule(end)

    def attend(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        given = last(next(batches)).view_as(hidden) if read else hidden.new_zeros(()).expand_as(hidden)
        return (given, *[None] * (outputs - 1)) if outputs else given

    module = layer.get_submodule(attention)
    module.forward = attend
    try:
        yield
    finally:
        del module.forward
