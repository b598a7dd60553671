"""AutoRound's tuned rounding on exactly the given token ids. Runs in its own environment; options: peer.py.

Everything that is not given is AutoRound's default (200 steps a block of 8 rows, learned rounding and clipping); a
sequence may be 512 tokens long, and the checkpoint is written in AutoGPTQ's format. The settings are its own, but for
`auto_scheme`: {"bits": [4, 8], "avg_bits": 4.5} lets AutoScheme choose for each linear, by the loss that it expects on
the texts of the same ids, under so many bits of a code in the mean (scales not counted). AutoGPTQ's format holds one
number of bits, so such a checkpoint has the weights that its codes stand for.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.auto_scheme import gen_auto_scheme
from auto_round.schemes import QuantizationScheme
from peer import Task, performed
from transformers import AutoModelForCausalLM, AutoTokenizer


class FromTexts(gen_auto_scheme.GenScheme):  # type: ignore[misc, no-any-unimported]
    """AutoScheme's own, which reads a file of texts only, while the tuning reads token ids."""

    def __init__(self, scheme: Any, model: Any, names: Any, fixed: Any, dataset: Any, **rest: Any) -> None:
        super().__init__(scheme, model, names, fixed, scheme.dataset, **rest)


def chosen_by_loss(task: Task, asked: dict[str, Any], texts: Path) -> Any:
    """AutoScheme over integers of `asked["bits"]`; `texts` becomes a file of the rows' texts."""
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    lines = [json.dumps({"text": tokenizer.decode(row)}) for row in task.rows]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    schemes = [
        QuantizationScheme(
            bits=bits, group_size=task.group_size, sym=task.symmetric, data_type="int", act_bits=16
        )
        for bits in asked["bits"]
    ]
    gen_auto_scheme.GenScheme = FromTexts
    return gen_auto_scheme.AutoScheme(
        avg_bits=asked["avg_bits"], options=schemes, ignore_scale_zp_bits=True, dataset=str(texts)
    )


def quantize(task: Task) -> None:
    torch.set_num_threads(task.threads)
    settings = dict(task.settings)
    asked = settings.pop("auto_scheme", None)
    with tempfile.TemporaryDirectory() as scratch:
        if asked:
            settings["scheme"] = chosen_by_loss(task, asked, Path(scratch) / "texts.jsonl")
        else:
            settings |= {"bits": task.bits, "group_size": task.group_size, "sym": task.symmetric}
        rounds = AutoRound(
            AutoModelForCausalLM.from_pretrained(task.model, dtype="auto"),
            AutoTokenizer.from_pretrained(task.model),
            dataset=[{"input_ids": torch.tensor([row])} for row in task.rows],
            nsamples=len(task.rows),
            seqlen=max(map(len, task.rows)),
            device_map="cpu",
            enable_torch_compile=False if asked else None,  # blocks of other bits would be compiled anew
            **settings,
        )
        rounds.quantize_and_save(f"{scratch}/out", format="fake" if asked else "auto_gptq")
        written = next(Path(scratch, "out").rglob("config.json")).parent  # it names a folder after the scheme
        shutil.copytree(written, task.out)


if __name__ == "__main__":
    performed(quantize)
