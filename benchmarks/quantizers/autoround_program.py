"""AutoRound's tuned rounding on exactly the given token ids. Runs in its own environment; options: peer.py.

Everything that is not given is AutoRound's default (200 steps a block of 8 rows, learned rounding and clipping); a
sequence may be 512 tokens long, and the checkpoint is written in AutoGPTQ's format. The settings are its own.
"""

import torch
from auto_round import AutoRound
from peer import Task, performed
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(task: Task) -> None:
    torch.set_num_threads(task.threads)
    rounds = AutoRound(
        AutoModelForCausalLM.from_pretrained(task.model, dtype="auto"),
        AutoTokenizer.from_pretrained(task.model),
        bits=task.bits,
        group_size=task.group_size,
        sym=task.symmetric,
        dataset=[{"input_ids": torch.tensor([row])} for row in task.rows],
        nsamples=len(task.rows),
        seqlen=max(map(len, task.rows)),
        device_map="cpu",
        **task.settings,
    )
    rounds.quantize_and_save(task.out, format="auto_gptq")


if __name__ == "__main__":
    performed(quantize)
