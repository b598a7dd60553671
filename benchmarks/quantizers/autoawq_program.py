"""AutoAWQ's AWQ on exactly the given token ids. Runs in its own environment; options: peer.py.

Everything that is not given is AutoAWQ's default: float16, 20 grid points, scales from weights and inputs, clipping,
all samples at once. It always writes zero points. Two changes make it run on the CPU with a model of transformers 5;
neither costs it anything that it does not spend on a GPU.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from peer import Task, performed


def copied(_module: object, state: dict[str, torch.Tensor], *_: object) -> None:
    state.update({name: tensor.clone() for name, tensor in state.items()})


class CopyingQuantizer(AwqQuantizer):
    """The search keeps the weights by `v.cpu()`, which copies on a GPU and not on the CPU; here it copies.

    Without the copy each candidate starts from the one before it, already rounded (0.2.9).
    """

    def _compute_best_scale(
        self, x: Any, w_mean: Any, x_mean: Any, module2inspect: torch.nn.Module, *rest: Any
    ) -> torch.Tensor:
        hook = module2inspect.register_state_dict_post_hook(copied)
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest)
        finally:
            hook.remove()


def for_transformers_4(model: Path, out: Path) -> Path:
    """`model` with its configuration in the words of transformers 4, which would ignore the base of RoPE."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= config.pop("rope_parameters")
    config.pop("rope_type")
    config["torch_dtype"] = config.pop("dtype")
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for weights in model.glob("*.safetensors*"):
        (out / weights.name).symlink_to(weights.resolve())
    return out


def quantize(task: Task) -> None:
    if task.symmetric or task.method != "awq":
        raise SystemExit("AutoAWQ writes asymmetric AWQ only")
    torch.set_num_threads(task.threads)
    with tempfile.TemporaryDirectory() as folder:
        model_path = for_transformers_4(Path(task.model), Path(folder))
        model = AutoAWQForCausalLM.from_pretrained(str(model_path), device_map="cpu")
    config = {"zero_point": True, "q_group_size": task.group_size, "w_bit": task.bits, "version": "GEMM"}
    model.quantize(
        None, quant_config=config, calib_data=task.rows, quantizer_cls=CopyingQuantizer, **task.settings
    )
    model.save_quantized(task.out)


if __name__ == "__main__":
    performed(quantize)
