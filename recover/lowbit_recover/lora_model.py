"""The low-rank part of a model: added to its linears by PEFT, and written in PEFT's format, which vLLM loads.

LoRA (Hu et al. 2021, arXiv 2106.09685): W x + (alpha / rank) B A x, with A (rank, in) and B (out, rank) in float32,
and W as it is: here what the checkpoint's codes stand for (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.durable import move, write_text
from lowbit_core.errors import ConfigError
from lowbit_core.names import did_you_mean
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.run.tensor_file import write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
ALL = "all-linear"
ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # up to which of these vLLM's kernels are asked to reach


def targets_of(architecture: Architecture, asked: Sequence[str]) -> list[str]:
    """Last parts of the names of the linears that are adapted: those of the decoder's layers; raises ConfigError.

    Routed experts and routers are left out, as engines adapt none of a quantized model's.
    """
    groups = [(kind, group) for kind in architecture.kinds for group in kind.groups]
    dense = [
        name
        for kind, group in groups
        if not kind.is_expert(group)
        for name in group.linears
        if "*" not in name
    ]
    known = sorted({name.rpartition(".")[2] for name in dense})
    if list(asked) == [ALL]:
        return known
    unknown = next((name for name in asked if name not in known), None)
    if unknown is not None or not asked:
        raise ConfigError(
            f"--targets {unknown!r} names no linear of the decoder; {did_you_mean(unknown or '', known)}"
            f"allowed are {ALL} or several of {', '.join(known)}"
        )
    return sorted(set(asked))


def adapt(model: Any, targets: Sequence[str], rank: int, alpha: float, seed: int) -> Any:
    """PEFT's model around `model`, whose weights are frozen; B is zero, so it computes what it did."""
    peft = peft_of()
    torch.manual_seed(seed)
    layout = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, layout)


def peft_of() -> Any:
    """The package; ConfigError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise ConfigError("lowbit lora needs the package peft; run `pip install 'lowbit[recover]'`") from None
    return peft


def trained(adapted: Any) -> dict[str, nn.Parameter]:
    """What is trained, by its name in PEFT's model."""
    return {name: one for name, one in adapted.named_parameters() if one.requires_grad}


def write_adapter(out: Path, adapted: Any, tensors: Mapping[str, Tensor], base: str, scratch: Path) -> None:
    """The two files of an adapter with these tensors, by their names in PEFT's model; `base` is the model's name."""
    files = {name.replace(".default.", "."): value.detach().float() for name, value in tensors.items()}
    layout = adapted.peft_config["default"].to_dict()
    layout |= {"base_model_name_or_path": base, "inference_mode": True, "revision": None}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in layout.items()}
    write_tensors(out / WEIGHTS, files, scratch)
    write_text(out / CONFIG, json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n", scratch)


def merged(model: Any, adapter: Path) -> Any:
    """A 16-bit model of transformers with an adapter's products added to its weights; raises ConfigError."""
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise ConfigError(
                f"--merge {adapter} is no adapter: it lacks {name}; give a directory that `lowbit lora` wrote"
            )
    peft = peft_of()
    try:
        around = peft.PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--merge {adapter} does not fit the model: {' '.join(str(error).split())[:200]}"
        ) from None
    return around.merge_and_unload(safe_merge=True)


def write_model(model: Any, out: Path, scratch: Path) -> None:
    """A model's files as transformers writes them."""
    whole = scratch / "merged"
    model.save_pretrained(whole)
    for path in sorted(whole.iterdir()):
        move(path, out / path.name)
    whole.rmdir()
