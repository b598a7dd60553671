"""Keys that readers on transformers 4 look for, beside those of transformers 5, in `config.json` and the tokenizer's.

vLLM of spring 2026 and before read a model of transformers 5 without them as one of default positions.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENIZER_CONFIG = "tokenizer_config.json"
NEW_TOKENIZER_CLASS, KNOWN_TOKENIZER_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
OLD_EXPERTS, NEW_EXPERTS = "num_experts", "num_local_experts"
GLOBAL, LOCAL = "full_attention", "sliding_attention"
LONGROPE = ("short_factor", "long_factor")


def with_older_keys(
    data: Mapping[str, Any], positions: Mapping[str, Any] | None, aliases: Mapping[str, str]
) -> dict[str, Any]:
    """A configuration with `rope_theta`, `rope_scaling`, `torch_dtype` and `num_experts` where it has them not.

    `positions` are transformers 5's `rope_parameters`, of all layers or by their kinds; `aliases` other names of its
    keys, by those: the number of experts is one that has changed places with its alias.
    """
    older: dict[str, Any] = {"torch_dtype": data["dtype"]} if "dtype" in data else {}
    if aliases.get(OLD_EXPERTS) == NEW_EXPERTS and NEW_EXPERTS in data:
        older[OLD_EXPERTS] = data[NEW_EXPERTS]
    if positions and "rope_theta" not in data and "rope_scaling" not in data:
        older |= _older_positions(positions)
    return {**data, **older}


def _older_positions(positions: Mapping[str, Any]) -> dict[str, Any]:
    if GLOBAL in positions:
        found = _older_positions(positions[GLOBAL])
        local = positions.get(LOCAL) or {}
        return found | ({"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {})
    if "rope_theta" not in positions:
        return {}
    found = {"rope_theta": positions["rope_theta"], "rope_scaling": _scaling(positions)}
    if "partial_rotary_factor" in positions:
        found["partial_rotary_factor"] = positions["partial_rotary_factor"]
    return found


def _scaling(positions: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = positions.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "longrope":  # the family that stretches so takes these keys and no others
        return {"type": kind, **{key: positions[key] for key in LONGROPE if key in positions}}
    rest = {
        key: value for key, value in positions.items() if key not in ("rope_theta", "partial_rotary_factor")
    }
    return {**rest, "rope_type": kind}


def name_known_tokenizer(directory: Path) -> None:
    """Call a tokenizer by the class that both versions have, and its further special tokens by the older key."""
    path = directory / TOKENIZER_CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(data, dict) or data.get("tokenizer_class") != NEW_TOKENIZER_CLASS:
        return
    data["tokenizer_class"] = KNOWN_TOKENIZER_CLASS
    if isinstance(data.get("extra_special_tokens"), list):
        data["additional_special_tokens"] = data.pop("extra_special_tokens")
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
