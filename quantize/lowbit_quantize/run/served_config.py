"""`config.json` of a checkpoint: the base's own, key by key, with compressed-tensors' `quantization_config`.

Modules are named one by one, in groups that do not overlap: vLLM takes the first group that matches,
compressed-tensors and TensorRT-LLM sort first, and so all of them find the same one. Only a layer's routed experts,
which share one entry and which transformers looks for by a pattern, are named by one pattern a layer.
"""

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers

from lowbit_quantize.device.memory import without_compiler
from lowbit_quantize.model.files.unopened_linears import read_plain_experts
from lowbit_quantize.model.skeleton import change, given, text_config
from lowbit_quantize.run.older_readers import with_older_keys
from lowbit_quantize.schemes.scheme import Scheme

with without_compiler():  # the library compiles a function for 4-bit floats, which is not called here
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

GONE = ("_name_or_path", "quantization_config", "auto_map", "transformers_version")
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
MIXED_FORMAT = "mixed-precision"  # where groups are stored differently
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\d+\.(?P<linear>\w+)")


def served_config(
    config: Any,
    written: Mapping[str, Any] | None,
    changed: Mapping[str, Any],
    quantization: dict[str, Any] | None,
    dtype: torch.dtype,
    architecture: str,
) -> dict[str, Any]:
    """The configuration as transformers and vLLM read it, of 4 and 5.

    `written` is the base's file, whose keys all stay but those that hold no more: code for a class that transformers
    has (`auto_map`), and its own quantization. `changed` are the decoder's keys that passes change, as transformers
    calls them.
    `architecture` is the class that was walked; the base's own stays where it is another head on the same layers.
    """
    data = dict(config.to_diff_dict() if written is None else written)
    for key in GONE:
        data.pop(key, None)
    change(data, changed, config)
    data["architectures"] = _classes(data.get("architectures"), config) or [architecture]
    data["dtype"] = str(dtype).removeprefix("torch.")
    data["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    if quantization:
        data |= _heads(config) if quantization.get("kv_cache_scheme") else {}
        data["quantization_config"] = quantization
    older = with_older_keys(data, getattr(config, "rope_parameters", None), config.attribute_map)
    return older if _positions(older, config) == getattr(config, "rope_parameters", None) else data


def _heads(config: Any) -> dict[str, Any]:
    """What compressed-tensors asks the configuration as a whole about a cache, of a wrapper's decoder."""
    text = text_config(config)
    found = {} if text is config else {key: given(text, key) for key in HEADS}
    return {key: value for key, value in found.items() if value is not None}


def _classes(named: Any, config: Any) -> list[str] | None:
    """The base's classes, where transformers has them for its configuration."""
    classes = named if isinstance(named, list) else []
    known = [getattr(transformers, name, None) for name in classes if isinstance(name, str)]
    if not classes or len(known) < len(classes):
        return None
    return classes if all(getattr(one, "config_class", None) is type(config) for one in known) else None


def _positions(data: Mapping[str, Any], config: Any) -> Any:
    """What transformers makes of the positions of a configuration."""
    plain = {key: copy.deepcopy(value) for key, value in data.items() if key != "quantization_config"}
    try:
        return type(config).from_dict(plain).rope_parameters
    except Exception:  # whatever an odd configuration makes of transformers' code
        return None


def quantization_config(
    schemes: Mapping[str, Scheme], unquantized: Sequence[str], *, fp8_cache: bool, by_head: bool = False
) -> dict[str, Any] | None:
    """compressed-tensors' configuration: the scheme of each linear by its published name, and the names of the others.

    None where nothing is compressed.
    """
    if not schemes and not fp8_cache:
        return None
    named: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        named.setdefault(scheme, []).append(name)
    groups = {
        f"group_{number}": QuantizationScheme(
            targets=targets_of(names), format=scheme.format, **scheme.quantization_args()
        )
        for number, (scheme, names) in enumerate(named.items())
    }
    formats = {scheme.format for scheme in named}
    config = QuantizationConfig(
        config_groups=groups,
        format=next(iter(formats)) if len(formats) == 1 else MIXED_FORMAT if formats else "dense",
        quantization_status="compressed",
        ignore=targets_of(unquantized),
        kv_cache_scheme=QuantizationArgs(
            num_bits=8, type="float", symmetric=True, strategy="attn_head" if by_head else "tensor"
        )
        if fp8_cache
        else None,
    )
    dumped: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    if any(map(EXPERT.fullmatch, unquantized)):
        read_plain_experts(dumped)
    return dumped


def targets_of(names: Iterable[str]) -> list[str]:
    """Full names, and one anchored pattern for the experts of each layer."""
    targets: list[str] = []
    experts: dict[str, list[str]] = {}
    for name in names:
        if found := EXPERT.fullmatch(name):
            linears = experts.setdefault(found["experts"], [])
            linears += [] if found["linear"] in linears else [found["linear"]]
        else:
            targets.append(name)
    return targets + [
        rf"re:^{re.escape(block).replace(chr(92) + '.', '[.]')}[.]\d+[.]({'|'.join(linears)})$"
        for block, linears in experts.items()
    ]
