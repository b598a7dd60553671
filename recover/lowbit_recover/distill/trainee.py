"""A checkpoint as a model that trains, and what it has learned as the tensors of the checkpoint's own files.

The model is quantize's skeleton with all its weights in float32: routed experts are plain linears, linears that are
stored as integers are fake-quantized. What was learned has the names, types and shapes that the files have, so that a
file is changed in place and nothing else of it moves.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from lowbit_core.errors import CheckpointError
from lowbit_evaluate.loaded_model import quantization_of
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.discovery.found import open_model
from lowbit_quantize.model.files.base_weights import BaseWeights, wanted_of
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.model.files.unopened_linears import schemes_of
from lowbit_quantize.model.reference import ModelReference
from lowbit_quantize.model.skeleton import is_tied
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.schemes.integer import PRESETS, Integer
from lowbit_quantize.schemes.numbers.affine import stored
from lowbit_recover.distill.fake_quantize import IntegerLinear, RoundedNorm
from lowbit_recover.distill.settings import Train

PACKED, SCALE = "weight_packed", "weight_scale"
CODEC = "compressed-tensors"
ARGUMENTS = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "actorder")
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Trainee:
    """A model whose `trained` parameters, by the model's names for them, have gradients; all are float32."""

    model: Any
    architecture: Architecture
    files: WeightFiles
    names: PublishedNames
    trained: Mapping[str, nn.Parameter]
    precision: str = "bf16"

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found

    @property
    def head(self) -> Tensor:
        """The output matrix, (vocabulary, hidden); it has gradients where it trains."""
        matrix: Tensor = self.model.get_output_embeddings().weight
        return matrix

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states before the head, (sequences, tokens, hidden), of token ids, (sequences, tokens)."""
        mixed = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            states: Tensor = self.model.get_decoder()(
                input_ids=ids.to(self.device), use_cache=False
            ).last_hidden_state
        return states

    def parameters(self) -> dict[str, Tensor]:
        """What has been learned so far, by name, on the CPU."""
        return {name: one.detach().cpu().clone() for name, one in self.trained.items()}

    @torch.no_grad()
    def take(self, learned: Mapping[str, Tensor]) -> None:
        """Set the trained parameters; the inverse of `parameters`."""
        for name, one in self.trained.items():
            one.copy_(learned[name])

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Everything that was trained, by the names in the files and in the types of the files.

        Raises CheckpointError where the files do not have a tensor of that name.
        """
        found, plain = dict[str, Tensor](), dict[str, Tensor]()
        for name, module in self.model.named_modules():
            if isinstance(module, IntegerLinear) and f"{name}.scale" in self.trained:
                published = self.names.published(name)
                found |= {
                    f"{published}.{part}": one.cpu() for part, one in module.quantized().tensors().items()
                }
        for name, one in self.trained.items():
            if not name.endswith((".scale", ".latent")):
                plain[name] = one.detach().cpu()
        stacked = self._others_of_stacks(plain)
        found |= self.names.publish(plain | stacked)
        if strange := sorted(name for name in found if name not in self.files):
            raise CheckpointError(
                f"{self.files.directory} lacks the tensor {strange[0]}, which was trained; make the checkpoint again "
                "with this Lowbit"
            )
        return {name: one.to(FLOATS.get(self.files.dtype(name), one.dtype)) for name, one in found.items()}

    def _others_of_stacks(self, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters beside those that train, where both lie in one stack of the files."""
        stacks = {part.stack for name, part in self.names.slices.items() if name in plain}
        own = dict(self.model.named_parameters())
        return {
            name: own[name].detach().cpu()
            for name, part in self.names.slices.items()
            if part.stack in stacks and name not in plain and name in own
        }


def check_trainable(reference: ModelReference, train: Train) -> dict[str, Integer]:
    """The integers of each linear that is quantized, by published name; CheckpointError where it cannot be trained."""
    quantization = quantization_of(reference)
    if not quantization:
        if train == "scales":
            raise CheckpointError(
                f"{reference.name} is not quantized, it has no scales to train; give --train weights"
            )
        return {}
    if quantization.get("quant_method") != CODEC:
        raise CheckpointError(
            f"{reference.name} is in the {quantization.get('quant_method')} format; only checkpoints as `lowbit "
            "quantize` writes them are trained, in integers of weights alone or in 16 bits"
        )
    files = WeightFiles(reference.path)
    linears = {
        name.removesuffix(f".{part}")
        for name in files
        for part in (PACKED, SCALE)
        if name.endswith(f".{part}")
    }
    schemes = {
        name: _integer(name, group) for name, group in schemes_of(quantization, sorted(linears)).items()
    }
    if unknown := sorted(linears - schemes.keys()):
        raise CheckpointError(f"{reference.name}: no group of its quantization_config names {unknown[0]}")
    return schemes


def _integer(name: str, group: Any) -> Integer:
    if group.input_activations is None and group.weights is not None:
        for preset in PRESETS:
            scheme = preset.make(group.weights.group_size or "channel")
            assert isinstance(scheme, Integer)
            ours = scheme.quantization_args()["weights"]
            same = all(getattr(ours, one) == getattr(group.weights, one) for one in ARGUMENTS)
            if same and str(group.format) == scheme.format:
                return scheme
    known = ", ".join(preset.name for preset in PRESETS)
    raise CheckpointError(
        f"{name} is stored as {group.format}, which is not trained; allowed are {known}, whose inputs are not rounded, "
        "and 16 bits: quantize to one of these"
    )


def build_trainee(
    reference: ModelReference, train: Train, device: torch.device, precision: str, *, checkpointing: bool
) -> Trainee:
    """Load a checkpoint for training; CheckpointError or ModelError where that is not possible."""
    schemes = check_trainable(reference, train)
    architecture, model = open_model(reference)
    files = WeightFiles(reference.path)
    weights = BaseWeights(files, wanted_of(model, architecture), None)
    names = weights.wanted.names
    integers = {name: names.published(name) for name in _linears(model) if names.published(name) in schemes}
    for name, published in integers.items():
        linear = model.get_submodule(name)
        bias = weights.read(f"{name}.bias").float() if f"{name}.bias" in weights else None
        quantized = _read(files, published, schemes[published])
        if tuple(quantized.codes.shape) != (linear.out_features, linear.in_features):
            raise CheckpointError(
                f"{published} is stored with the shape {tuple(quantized.codes.shape)}, its configuration says "
                f"{(linear.out_features, linear.in_features)}; copy the checkpoint again"
            )
        model.set_submodule(name, IntegerLinear(quantized, bias, codes_move=train == "weights"))
    _fill(model, weights, is_tied(model, architecture))
    model.to(device)
    trained = _choose(model, train, weights)
    if checkpointing:
        layers: Any = model.get_submodule(architecture.layers)
        for layer in layers:
            layer.forward = _recomputed(layer.forward)
    return Trainee(model.eval(), architecture, files, names, trained, precision)


def _linears(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name


def _read(files: WeightFiles, published: str, scheme: Integer) -> Any:
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    try:
        found = scheme.read(
            {part: files.read(name) for part in parts if (name := f"{published}.{part}") in files}
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{published} cannot be read as {scheme.name}: {error}; quantize the model again"
        ) from error
    if not torch.equal(stored(found.params["scale"]), found.params["scale"]):
        raise CheckpointError(
            f"{published} has scales that {scheme.name} of Lowbit cannot hold; quantize the model again"
        )
    return found


def _fill(model: nn.Module, weights: BaseWeights, tied: bool) -> None:
    """Give every parameter that is still on the meta device its numbers, in float32; buffers those that are stored."""
    shared: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in shared:
                values = weights.read(f"{prefix}.{leaf}".lstrip("."))
                if values.is_floating_point():
                    values = values.float()
                shared[id(parameter)] = nn.Parameter(values.clone(), requires_grad=False)
            module._parameters[leaf] = shared[id(parameter)]
        if isinstance(module, IntegerLinear):
            continue
        for leaf in list(module._buffers):
            name = f"{prefix}.{leaf}".lstrip(".")
            if leaf not in module._non_persistent_buffers_set and name in weights:
                module._buffers[leaf] = weights.read(name)
    if tied:
        model.tie_weights()  # type: ignore[operator]


def _choose(model: nn.Module, train: Train, weights: BaseWeights) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; they alone have gradients."""
    model.requires_grad_(False)
    found: dict[str, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, IntegerLinear):
            found |= {f"{name}.{leaf}": one for leaf, one in module.named_parameters(recurse=False)}
        elif "norm" in type(module).__name__.lower():
            for leaf, one in list(module.named_parameters(recurse=False)):
                inner = f"{name}.{leaf}"
                found[inner] = one
                dtype = FLOATS[weights.dtype(inner)]
                if dtype != torch.float32:
                    parametrize.register_parametrization(module, leaf, RoundedNorm(dtype))
        elif train == "weights":
            for leaf, one in module.named_parameters(recurse=False):
                if one.is_floating_point() and id(one) not in map(id, found.values()):
                    found[f"{name}.{leaf}"] = one
    for one in found.values():
        one.requires_grad_(True)
    return found


def _recomputed(forward: Any) -> Any:
    """A layer's forward whose inner results are not kept for the way back, but computed again."""

    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return run
