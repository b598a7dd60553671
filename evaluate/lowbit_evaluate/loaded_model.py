"""Loads a whole model with plain transformers: a base model, or a checkpoint in any format that transformers opens.

Where the checkpoint has an FP8 KV cache, keys and values are rounded with its scales, as when it is served. The
compressed-tensors package would do this itself, but it rounds the scales to bfloat16 first; it is switched off.
Inputs that engines round are rounded too (rounded_inputs.py).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils.logging import disable_progress_bar

from lowbit_core.errors import ModelError
from lowbit_core.manifest import Manifest, read_manifest
from lowbit_core.manifest_files import verify_files
from lowbit_evaluate.rounded_inputs import round_inputs
from lowbit_evaluate.unopened_linears import UnopenedLinears, unopened_linears
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.discovery.found import open_model
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.model.hooks import HookedCache
from lowbit_quantize.model.logits import PLAIN, LogitsForm
from lowbit_quantize.model.reference import ModelReference, fetch_weights
from lowbit_quantize.model.skeleton import build_skeleton, is_tied, model_class, text_config
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.schemes.kv_cache import KVScales

READERS = {
    "awq": "gptqmodel",
    "gptq": "gptqmodel",
}  # the package that transformers needs for each older format
Scales = Mapping[int, KVScales]


@dataclass(frozen=True)
class LoadedModel:
    """A model with all its weights. `scales` quantize its KV cache, by layer; empty where it is not quantized.

    `logits` makes logits of what the head gives.
    """

    name: str
    model: Any
    tokenizer: Any
    scales: Scales
    logits: LogitsForm = PLAIN

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def head(self) -> Tensor:
        """The output matrix, (vocabulary, hidden)."""
        matrix: Tensor = self.model.get_output_embeddings().weight.detach()
        return matrix

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states before the head, (sequences, tokens, hidden), of token ids, (sequences, tokens)."""
        with torch.inference_mode():
            states: Tensor = self.model.get_decoder()(
                input_ids=ids.to(self.model.device), use_cache=False
            ).last_hidden_state
        return states


def load_model(
    reference: ModelReference,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    fp8_cache: bool = True,
) -> LoadedModel:
    """Load a model; ModelError or CheckpointError where that is not possible.

    `dtype` is by default the one that it is served in. Without `fp8_cache` the checkpoint's scales are not used.
    """
    architecture, manifest = check_loadable(reference), checkpoint_manifest(reference)
    fetch_weights(reference)
    scales = _scales(reference, architecture, manifest) if fp8_cache else {}
    unopened = None
    if reference.kind == "directory":
        unopened = unopened_linears(reference.path, quantization_of(reference))
    model = _load(reference, dtype or _served_dtype(reference), unopened).to(device).eval()
    _round_caches(model, architecture, scales)
    round_inputs(model)
    if unopened:
        unopened.put_into(model, architecture, PublishedNames(build_skeleton(reference.config)))
    with torch.no_grad():  # compressed-tensors unpacks when the model as a whole is first called
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    return LoadedModel(reference.name, model, reference.tokenizer(), scales, architecture.logits)


def check_loadable(reference: ModelReference) -> Architecture:
    """ModelError where the model cannot be loaded, judging by its configuration and a GGUF file's header."""
    method = quantization_of(reference).get("quant_method")
    reader = READERS.get(str(method))
    if reader and find_spec(reader) is None:
        raise ModelError(
            f"{reference.name} is in the {method} format, which transformers opens with {reader}, and that is not "
            "installed; serve the checkpoint and give --target URL, or evaluate one in the default format"
        )
    architecture, skeleton = open_model(reference)
    if reference.kind == "gguf":
        from lowbit_quantize.model.gguf_file import GgufFile  # imported for GGUF files only

        GgufFile(reference, skeleton)  # refuses what transformers drops
    return architecture


def checkpoint_manifest(reference: ModelReference) -> Manifest | None:
    """The manifest of a checkpoint, once its files are all there; None of any other model."""
    if reference.kind != "directory":
        return None
    manifest = read_manifest(reference.path)
    if manifest:
        verify_files(reference.path, manifest, hashes=False)
    return manifest


def _served_dtype(reference: ModelReference) -> torch.dtype:
    dtype = reference.config.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def quantization_of(reference: ModelReference) -> dict[str, Any]:
    """The configuration's `quantization_config`; empty where the model is not quantized."""
    if reference.kind == "gguf":
        return {}
    found = getattr(reference.config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else dict(found.to_dict())


def _load(reference: ModelReference, dtype: torch.dtype, unopened: UnopenedLinears | None) -> Any:
    disable_progress_bar()  # ours is enough
    if reference.kind == "gguf" and _only_we_read(reference):
        return _load_parts(reference, dtype)
    found = model_class(reference.config)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "trust_remote_code": False}
    place: Path | None = reference.path
    if reference.kind == "gguf":
        place, file = reference.path.parent, reference.path.name
        options |= {"gguf_file": file, "quantization_config": GgufConfig(gguf_file=file, dequantize=True)}
    else:
        options |= {
            "local_files_only": True,
            "attn_implementation": "sdpa" if found._supports_sdpa else "eager",
        }
    if unopened:
        place, options = None, _with_linears(reference, dtype, unopened, options)
    try:
        model, info = found.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{reference.name} cannot be opened by transformers: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{reference.name} lacks {len(missing)} tensors, the first is {missing[0]}")
    return model


def _with_linears(
    reference: ModelReference, dtype: torch.dtype, unopened: UnopenedLinears, options: dict[str, Any]
) -> dict[str, Any]:
    """What a class is given that opens tensors which were read already."""
    config = copy.deepcopy(reference.config)
    config.quantization_config = unopened.plain
    if config.quantization_config is None:
        del config.quantization_config
    unused = ("trust_remote_code", "local_files_only")
    options = {key: value for key, value in options.items() if key not in unused}
    return options | {"config": config, "state_dict": unopened.state(dtype)}


def _only_we_read(reference: ModelReference) -> bool:
    """Whether a GGUF model has several parts, which transformers does not read, or positions that it leaves out."""
    from lowbit_quantize.model.sources.gguf_model import GgufModel  # imported for GGUF files only

    model = GgufModel(reference.path)
    return len(model.parts) > 1 or model.stretching is not None


def _load_parts(reference: ModelReference, dtype: torch.dtype) -> Any:
    """A GGUF model that transformers does not read, as quantize reads it: tensor by tensor."""
    from lowbit_quantize.model.gguf_file import GgufFile  # as above

    architecture, skeleton = open_model(reference)
    stored = GgufFile(reference, skeleton)
    model = AutoModelForCausalLM.from_config(
        reference.config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
    )
    tied = {f"{architecture.head}.weight"} if is_tied(skeleton, architecture) else set()
    state = model.state_dict()
    if missing := sorted(name for name in state.keys() - tied if name not in stored):
        raise ModelError(f"{reference.name} lacks {len(missing)} tensors, the first is {missing[0]}")
    for name in state.keys() - tied:
        state[name].copy_(stored.read(name))
    return model


def _scales(reference: ModelReference, architecture: Architecture, manifest: Manifest | None) -> Scales:
    """The manifest's scales; without a manifest, those in the weight files."""
    if manifest:
        kv = manifest.kv_cache
        layers = [one for one in kv.layers if one.layer not in kv.skip_layers] if kv else []
        return {one.layer: KVScales(one.k_scale, one.v_scale) for one in layers}
    if not quantization_of(reference).get("kv_cache_scheme"):
        return {}
    names = PublishedNames(build_skeleton(reference.config))
    depth = int(text_config(reference.config).num_hidden_layers)
    return _stored_scales(WeightFiles(reference.path), architecture, names, depth)


def _stored_scales(
    weights: WeightFiles, architecture: Architecture, names: PublishedNames, depth: int
) -> Scales:
    found = {}
    for index in range(depth):
        place = names.published(f"{architecture.layers}.{index}.{architecture.kinds[index].attention}")
        stored = [f"{place}.{kind}_scale" for kind in "kv"]
        if all(name in weights for name in stored):
            k_scale, v_scale = (weights.read(name).float().flatten().tolist() for name in stored)
            found[index] = KVScales(_scale(k_scale), _scale(v_scale))
    return found


def _scale(stored: list[float]) -> float | tuple[float, ...]:
    """One scale, or one for each head."""
    return stored[0] if len(stored) == 1 else tuple(stored)


def _round_caches(model: Any, architecture: Architecture, scales: Scales) -> None:
    """Give each layer a cache that rounds keys and values, and switch off that of compressed-tensors."""
    layers: Any = model.get_submodule(architecture.layers)
    for index, layer in enumerate(layers):
        if attention := architecture.kinds[index].attention:
            layer.get_submodule(attention).quantization_enabled = False
        if index in scales:
            layer.register_forward_pre_hook(_with_cache(scales[index]), with_kwargs=True)


def _with_cache(scales: KVScales) -> Any:
    def hook(
        _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, {**named, "past_key_values": HookedCache(scales)}

    return hook
