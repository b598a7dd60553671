"""GPTQModel's GPTQ or AWQ on exactly the given token ids. Runs in its own environment; options: peer.py.

Everything that is not given is GPTQModel's default: group-aware order, damping, batch size 1. The settings are
those of its `QuantizeConfig`.
"""

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD
from peer import Task, performed


def config(task: Task) -> QuantizeConfig:
    method = {"gptq": (METHOD.GPTQ, FORMAT.GPTQ), "awq": (METHOD.AWQ, FORMAT.GEMM)}[task.method]
    return QuantizeConfig(
        method=method[0],
        format=method[1],
        bits=task.bits,
        group_size=task.group_size,
        sym=task.symmetric,
        **task.settings,
    )


def quantize(task: Task) -> None:
    torch.set_num_threads(task.threads)
    model = GPTQModel.load(task.model, config(task), device="cpu")
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in task.rows])
    model.save(task.out)


if __name__ == "__main__":
    performed(quantize)
