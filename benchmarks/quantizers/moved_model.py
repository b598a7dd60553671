"""A second model for the comparison: the demo model, its weights moved off the grid of the 4-bit file they came from.

    python benchmarks/quantizers/moved_model.py --base DIR --out DIR

Every weight of a linear gets Gaussian noise of `NOISE` times the root mean square of its row, about a third of a step
of the 4-bit file. Then the model learns for `STEPS` steps to say what the base says (KL, AdamW) on Python's own
language reference (`pydoc_data.topics`, PSF-2.0), which neither calibrates nor judges. Prints the loss as it falls.
"""

import argparse
import pydoc_data.topics
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

NOISE, STEPS, ROWS, TOKENS, RATE = 0.05, 60, 2, 512, 1e-4


def text_rows(base: Path) -> Tensor:
    """(rows, TOKENS) token ids of the language reference, shuffled."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = torch.tensor(AutoTokenizer.from_pretrained(base)(text)["input_ids"])
    rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    return rows[torch.randperm(len(rows))]


def moved(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            size = module.weight.square().mean(1, keepdim=True).sqrt()
            module.weight.data.add_(torch.randn_like(module.weight) * size * NOISE)


def divergence(base: torch.nn.Module, model: torch.nn.Module, rows: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = base(input_ids=rows).logits.log_softmax(-1)
    said = model(input_ids=rows).logits.log_softmax(-1)
    return (wanted.exp() * (wanted - said)).sum(-1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = text_rows(arguments.base)
    base, model = (
        AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32) for _ in range(2)
    )
    moved(model)
    learner = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        loss = divergence(base, model, rows[torch.arange(step * ROWS, (step + 1) * ROWS) % len(rows)])
        loss.backward()
        learner.step()
        learner.zero_grad()
        if step % 10 == 0 or step == STEPS - 1:
            print(f"step {step + 1} of {STEPS}: KL {loss.item():.4f}", file=sys.stderr, flush=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    for file in (*arguments.base.glob("tokenizer*"), *arguments.base.glob("chat_template*")):
        shutil.copy(file, arguments.out)


if __name__ == "__main__":
    main()
