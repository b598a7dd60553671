"""A linear in vLLM's own class for its scheme, loaded with the tensors that a checkpoint has of it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class NoKernel(Exception):
    """There is none here, and why."""


def vllm_product(linear: Any, inputs: Tensor) -> Tensor:
    """What vLLM makes of inputs (tokens, in); raises NoKernel where it has no kernel for the scheme here."""
    if find_spec("vllm") is None:
        raise NoKernel("it is not installed")
    with _one_rank():
        scheme, layer = _loaded(linear, inputs.device)
        output: Tensor = scheme.apply_weights(layer, inputs, None)
    return output


def _loaded(linear: Any, device: torch.device) -> tuple[Any, nn.Module]:
    """vLLM's scheme, and a layer that has what is in the file, as it is before the first token."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    parts = linear.scheme.quantization_args()
    config = CompressedTensorsConfig({}, [], linear.scheme.format, config={})
    outputs, inputs = linear.codes.shape
    layer = nn.Module()
    try:
        scheme = config._get_scheme_from_parts(
            parts["weights"], parts.get("input_activations"), format=linear.scheme.format, layer_name="any"
        )
        scheme.create_weights(
            layer=layer,
            output_partition_sizes=[outputs],
            input_size_per_partition=inputs,
            input_size=inputs,
            output_size=outputs,
            params_dtype=torch.bfloat16,
            weight_loader=None,
        )
    except (ValueError, NotImplementedError) as error:
        raise NoKernel(" ".join(str(error).split())[:200]) from error
    for name, tensor in linear.tensors().items():
        place = getattr(layer, name)
        place.data.copy_(tensor.view(place.shape))
    layer.to(device)
    scheme.process_weights_after_loading(layer)
    return scheme, layer


@cache
def _configuration() -> Any:
    """vLLM's configuration of a tiny model, without which its classes are not made."""
    from tests.tiny_models import write_tiny_model
    from vllm.config import ModelConfig, VllmConfig

    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "model", "llama")
        return VllmConfig(model_config=ModelConfig(model=str(model)))


@contextmanager
def _one_rank() -> Iterator[None]:
    """vLLM's groups of ranks, of this process alone."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(_configuration()):
        init_distributed_environment(1, 0, f"file://{folder}/ranks", 0, "gloo")
        initialize_model_parallel(1)
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()
