"""The narrow twin of a model, on the CPU in float32, with seeded weights that are made when a module is first called.

Of each kind of decoder layer the first one is there; all others pass on what they are given. So the twin has as many
layers as the model, with its pattern, and costs what a few narrow ones cost.
"""

import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit_core.errors import ModelError
from lowbit_quantize.model.discovery.narrow import narrowed
from lowbit_quantize.model.hooks import removed_after
from lowbit_quantize.model.skeleton import build_skeleton
from lowbit_quantize.model.streams.form import PLAIN_STREAM, StreamForm
from lowbit_quantize.model.streams.stand_in import StandIn, apart

SEQUENCES, TOKENS = 2, 24
OTHER_PARTS = ("vision", "visual", "audio")  # of a model that reads pictures or sounds too
EXPERT_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass
class Call:
    """One call of a decoder layer, and how long the tuple was that it gave (0: no tuple).

    `left`: the keyword of the mapping in which it leaves tensors for later layers, if it does; `form`: how hidden
    states lie.
    """

    layer: nn.Module
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: int
    left: str = ""
    form: StreamForm = PLAIN_STREAM


@dataclass
class Twin:
    """A twin that ran once. `calls` are those of the first layer of each kind, by its number."""

    model: nn.Module
    config: Any
    layers: str
    calls: dict[int, Call] = field(default_factory=dict)
    kinds: list[int] = field(default_factory=list)  # for each layer, the number of the first of its kind
    ends: dict[str, tuple[Any, Any]] = field(
        default_factory=dict
    )  # what modules outside layers read and gave
    first_input: Any = None  # of the first layer
    last_output: Any = None  # of the last layer
    logits: Any = None
    form: StreamForm = PLAIN_STREAM  # as far as layers' calls show it


def make_twin(config: Any) -> Twin:
    """Build and run the twin of a configuration; raises ModelError where no decoder layers show."""
    errors: list[str] = []
    for of_heads in (False, True):
        narrow = narrowed(config, of_heads=of_heads)
        try:
            model = build_skeleton(narrow).float().requires_grad_(False)
            return _run(model, narrow, _decoder_layers(model, narrow.get_text_config().num_hidden_layers))
        except Exception as error:  # whatever a model does of which nothing is known
            errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    raise ModelError(
        f"{config.model_type}: its decoder layers cannot be found by running a narrow twin ({errors[0]})"
    )


def _decoder_layers(model: nn.Module, depth: int) -> str:
    """The list that has as many modules as the configuration has layers, and is in no other."""
    lists: list[str] = [
        name for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one) == depth
    ]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    text: list[str] = [name for name in outer if not any(word in name for word in OTHER_PARTS)] or outer
    if len(text) != 1:
        raise ModelError(f"{len(text)} lists have {depth} modules")
    return text[0]


def _run(model: nn.Module, config: Any, name: str) -> Twin:
    layers: Any = model.get_submodule(name)
    kinds = first_of_kinds(list(layers))
    twin = Twin(model, config, name, kinds=kinds)
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    stand_ins = nn.ModuleList(layer if kinds[i] == i else StandIn(layer) for i, layer in enumerate(layers))
    ids, others = torch.randint(3, 128, (2, SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(5))
    setattr(parent, leaf, stand_ins)
    again = Twin(model, config, name, kinds=kinds)
    with said_to_be_on_the_cpu(), torch.no_grad():
        with made_when_called(model, stand_ins), _calls(twin, stand_ins), _ends(twin):
            twin.logits = model(input_ids=ids, use_cache=False).logits
        with _calls(again, stand_ins):
            model(input_ids=others, use_cache=False)
    missing = [number for number in set(kinds) if number not in twin.calls]
    if missing:
        raise ModelError(f"layer {missing[0]} is not called")
    twin.form = _form(twin, again)
    for call in twin.calls.values():
        call.form = twin.form
    return twin


def _form(twin: Twin, again: Twin) -> StreamForm:
    """How hidden states lie, and what depends on the tokens beside them, from two runs on unlike tokens."""
    shape = tuple(twin.first_input.shape)
    before = next((at for at in range(len(shape)) if shape[at : at + 2] == (SEQUENCES, TOKENS)), None)
    rest = None if before is None else shape[:before] + shape[before + 2 : -1]
    if before is None or before > 1 or rest is None or len(rest) > 1:
        raise ModelError(
            f"its layers are given hidden states of the shape {shape}, of which nothing is known"
        )
    told: dict[int | str, None] = {}
    for number, call in twin.calls.items():
        other = again.calls[number]
        others = _by_place(other)
        told |= dict.fromkeys(
            place for place, value in _by_place(call).items() if not _equal(value, others.get(place))
        )
    left = {call.left for call in twin.calls.values()} - {""}
    if len(left) > 1:
        raise ModelError(
            f"its layers leave tensors for later ones in several places ({', '.join(sorted(left))})"
        )
    return StreamForm(
        copies=rest[0] if rest else 1,
        copies_first=before == 1,
        told=tuple(told),
        left=next(iter(left), ""),
    )


def _by_place(call: Call) -> dict[int | str, Any]:
    places: dict[int | str, Any] = dict(enumerate(call.args))
    return places | dict(call.kwargs.items())


def _equal(one: Any, other: Any) -> bool:
    """Whether two sets of arguments are alike, but for objects that are no tensors."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return all(_equal(value, other.get(key)) for key, value in one.items())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return True


def first_of_kinds(layers: list[nn.Module]) -> list[int]:
    """For each layer the number of the first that is made alike."""
    first: dict[Any, int] = {}
    return [first.setdefault(signature(layer), number) for number, layer in enumerate(layers)]


def signature(layer: nn.Module) -> Any:
    """Equal for layers that compute alike: modules with their classes and shapes, and their switches."""
    modules = []
    for name, module in layer.named_modules():
        switches = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, bool | str | int | float)
            and key not in ("layer_idx", "training", "layer_id")
        )
        shapes = tuple((key, tuple(one.shape)) for key, one in module.named_parameters(recurse=False))
        modules.append((EXPERT_NUMBER.sub("*", name), type(module).__name__, switches, shapes))
    return tuple(dict.fromkeys(modules))


@contextmanager
def _ends(twin: Twin) -> Iterator[None]:
    """Keep what modules outside the layers read and give."""
    handles = []
    for name, module in twin.model.named_modules():
        if name.startswith(f"{twin.layers}.") or next(module.parameters(recurse=False), None) is None:
            continue

        def hook(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            read = args[0] if args and isinstance(args[0], Tensor) else None
            if isinstance(output, Tensor):
                twin.ends.setdefault(name, (read, output))

        handles.append(module.register_forward_hook(hook))
    with removed_after(handles):
        yield


@contextmanager
def _calls(twin: Twin, layers: nn.ModuleList) -> Iterator[None]:
    handles: list[Any] = []
    for number in dict.fromkeys(twin.kinds):
        before: dict[str, set[Any]] = {}

        def look(_: nn.Module, args: Any, kwargs: Any, before: dict[str, set[Any]] = before) -> None:
            before.update((name, set(value)) for name, value in _mappings(kwargs))

        def hook(
            layer: nn.Module,
            args: Any,
            kwargs: Any,
            output: Any,
            number: int = number,
            before: dict[str, set[Any]] = before,
        ) -> None:
            hidden, rest = apart(args, kwargs)
            left = next((name for name, value in _mappings(kwargs) if set(value) > before[name]), "")
            call = Call(
                layer, hidden, *rest, outputs=len(output) if isinstance(output, tuple) else 0, left=left
            )
            for other, kind in zip(layers, twin.kinds, strict=True):
                if kind == number and isinstance(other, StandIn):
                    other.outputs = call.outputs
            twin.calls.setdefault(number, call)

        handles.append(layers[number].register_forward_pre_hook(look, with_kwargs=True))
        handles.append(layers[number].register_forward_hook(hook, with_kwargs=True))

    def first(_: nn.Module, args: Any, kwargs: Any) -> None:
        twin.first_input = apart(args, kwargs)[0]

    def last(_: nn.Module, args: Any, output: Any) -> None:
        twin.last_output = output[0] if isinstance(output, tuple) else output

    handles.append(layers[0].register_forward_pre_hook(first, with_kwargs=True))
    handles.append(layers[-1].register_forward_hook(last))
    with removed_after(handles):
        yield


def _mappings(kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in kwargs.items() if isinstance(value, MutableMapping)]


@contextmanager
def said_to_be_on_the_cpu() -> Iterator[None]:
    """While the block runs: some models move what they read to where their first parameter is, be it not made yet."""
    own: Any = PreTrainedModel
    before = vars(own).get("device")
    own.device = torch.device("cpu")
    try:
        yield
    finally:
        if before is None:
            del own.device
        else:
            own.device = before


@contextmanager
def made_when_called(model: nn.Module, layers: nn.ModuleList) -> Iterator[None]:
    """Give every module its weights when it is called; a decoder layer and all in it at once.

    The embedding has them before: some models move the tokens to where its weights are, and on the meta device tokens
    are whatever lay in memory.
    """
    generator = torch.Generator().manual_seed(3)
    make_weights(model.get_input_embeddings(), generator)  # type: ignore[operator]
    whole = {id(layer) for layer in layers}

    def hook(module: nn.Module, _: Any) -> None:
        for part in module.modules() if id(module) in whole else (module,):
            make_weights(part, generator)

    handles = [
        module.register_forward_pre_hook(hook)
        for module in model.modules()
        if not isinstance(module, StandIn)
    ]
    with removed_after(handles):
        yield


def make_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Seeded weights for a module's own parameters that have none yet."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if not parameter.is_meta:
            continue
        shape = parameter.shape
        if (parameter.dim() <= 1 and name == "weight") or parameter.dim() == 0:
            values = torch.rand(shape, generator=generator) + 0.5
        elif parameter.dim() == 1:
            values = 0.1 * torch.randn(shape, generator=generator)
        else:
            values = torch.randn(shape, generator=generator) * (1.5 / shape[-1] ** 0.5)
        setattr(module, name, nn.Parameter(values, requires_grad=False))
