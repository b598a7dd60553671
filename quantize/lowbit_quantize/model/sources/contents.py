"""What a directory or a repository holds, by the names of its files: a base model, or what else, and what to do.

It reads no file but `config.json` and `adapter_config.json`, and those from its caller.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from lowbit_quantize.model.sources.gguf_parts import first_parts
from lowbit_quantize.model.weights import INDEX_NAME, SINGLE_NAME

CONFIG, ADAPTER, PIPELINE = "config.json", "adapter_config.json", "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|scaler|openvino)", re.ASCII)
NO_MODEL = ("mmproj", "imatrix")  # how GGUF files begin that lie beside a model: a picture tower, a statistic
OTHERS = {  # the end of a name, what it is a file of
    ".onnx": "ONNX",
    "openvino_model.xml": "OpenVINO",
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    ".nemo": "NeMo",
    ".tflite": "LiteRT",
    ".task": "LiteRT",
    ".engine": "TensorRT-LLM",
    ".pte": "ExecuTorch",
    ".mlpackage": "Core ML",
}


def has_weights(names: Collection[str]) -> bool:
    """Whether safetensors are there, as transformers names them."""
    return SINGLE_NAME in names or INDEX_NAME in names


def is_weights(name: str) -> bool:
    """Whether a file holds weights in any library's format, so that its directory may be a model's."""
    return name.endswith((".safetensors", *PICKLES, *OTHERS))


def gguf_models(names: Collection[str]) -> list[str]:
    """GGUF files that are the model, where it is not there in a better form too; of one that is split, one part."""
    if CONFIG in names and (has_weights(names) or _pickles(names)):
        return []
    return [name for name in first_parts(names) if not name.rpartition("/")[2].lower().startswith(NO_MODEL)]


def _pickles(names: Collection[str]) -> list[str]:
    top = sorted(name for name in names if "/" not in name)
    return [name for name in top if name.endswith(PICKLES) and not NO_WEIGHTS.match(name)]


def obstacle(
    names: Collection[str],
    config: Mapping[str, Any],
    adapter: Mapping[str, Any],
    place: str,
    *,
    complete: bool = True,
) -> str | None:
    """Why these files are no base model and what to do about it; None where they are one.

    `config` and `adapter` are what the files of those names hold, `place` is where they are. Where the list is not
    `complete`, weights are still to come.
    """
    if ADAPTER in names:
        return _adapter(names, adapter, place)
    if PIPELINE in names:
        return f"is a pipeline of diffusers ({PIPELINE}), not a language model; give a language model's directory"
    if (library := _quantized_by(config)) is not None:
        return f"is already quantized ({library}); give the unquantized model"
    if CONFIG not in names or (complete and not has_weights(names)):
        return _other_format(names, place) or _incomplete(names)
    return None


def _adapter(names: Collection[str], adapter: Mapping[str, Any], place: str) -> str:
    if has_weights(names):
        return (
            f"holds a model and an adapter ({ADAPTER}), which transformers would add to it; "
            f"remove the one that is not meant"
        )
    base = adapter.get("base_model_name_or_path")
    return (
        f"is a LoRA adapter{f' of {base}' if base else ''}, not a model; merge it into its base first: "
        'python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"M.from_pretrained('{place}', dtype='auto').merge_and_unload().save_pretrained('merged')\", "
        "copy the tokenizer's files there, and give that directory"
    )


def _quantized_by(config: Mapping[str, Any]) -> str | None:
    """The library whose format these weights are in, where transformers opens no such format."""
    settings, other = config.get("quantization"), config.get("quantization_config")
    if isinstance(settings, Mapping) and "group_size" in settings:
        return f"MLX, {settings.get('bits')} bits"
    method = other.get("quant_method") if isinstance(other, Mapping) else None
    return str(method) if method in ("exl2", "exl3") else None


def _other_format(names: Collection[str], place: str) -> str | None:
    if "consolidated.safetensors" in names or "params.json" in names:
        return "has the weights in their maker's own format (params.json); give them as Hugging Face publishes them"
    if pickles := _pickles(names):
        return (
            f"has its weights as {pickles[0]}, which can hold code and is not read; write them as safetensors first: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{place}', dtype='auto').save_pretrained('converted')\", "
            "copy the tokenizer's files there, and give that directory"
        )
    for end, library in OTHERS.items():
        if any(name.endswith(end) for name in names):
            return f"is an export for {library}; give the model that it was made of"
    return None


def _incomplete(names: Collection[str]) -> str:
    inner = sorted({name.rpartition("/")[0] for name in names if name.endswith(f"/{CONFIG}")})
    if CONFIG not in names and inner:
        return f"has no {CONFIG}, but holds models in {', '.join(inner)}; give one of these directories"
    if CONFIG not in names:
        return f"has no {CONFIG}; give a Hugging Face model directory"
    others = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    hint = f"; {others[0]} is no name that transformers looks for" if others else ""
    return f"has no safetensors weights ({SINGLE_NAME} or {INDEX_NAME}){hint}"
