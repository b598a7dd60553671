"""One evaluator for every tool: how far a checkpoint's next-token distribution is from its base model's.

    python kl.py --base DIR --checkpoint DIR --token-ids FILE --threads 2

Runs both models with transformers in float32, the checkpoint unpacked by `dequantize.py`, so that kernels play no
part and every tool is judged by the same arithmetic; inputs are rounded where it says so (`rounded_inputs.py`). The KV
cache is not quantized here. The last line of stdout is a JSON object: mean KL in nats, its standard error over rows,
each row's, top-1 agreement, perplexities. `--rows` takes the first rows only.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from dequantize import dequantized
from rounded_inputs import round_inputs
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Row:
    """Means over the predictions of one row."""

    kl: float
    top1: float
    base_nll: float
    nll: float


def load(base: Path, checkpoint: Path | None = None) -> torch.nn.Module:
    """The base model in float32, with the weights that `checkpoint` stands for if one is given."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    if checkpoint is not None:
        weights = dequantized(checkpoint)
        wanted = dict(model.named_parameters())  # a tied head is the embedding and not named
        tied = {"lm_head.weight"} - wanted.keys()
        if missing := wanted.keys() - weights.keys():
            raise SystemExit(f"{checkpoint.name} lacks {len(missing)} weights, one is {min(missing)}")
        if unknown := weights.keys() - wanted.keys() - tied:
            raise SystemExit(f"{checkpoint.name} has {len(unknown)} weights too many, one is {min(unknown)}")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(weights[name])
        round_inputs(model, checkpoint)
    return model.eval()


def last_states(model: torch.nn.Module, ids: list[list[int]]) -> list[torch.Tensor]:
    """What the head reads, (tokens, hidden) for each row."""
    return [model.model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ids]


def kept(model: torch.nn.Module, ids: list[list[int]], file: Path | None) -> list[torch.Tensor]:
    """The base model's last states, computed once and kept in `file`."""
    if file is not None and file.exists():
        return list(torch.load(file))
    states = last_states(model, ids)
    if file is not None:
        torch.save(states, file)
    return states


def compare(base_log: torch.Tensor, other_log: torch.Tensor, targets: torch.Tensor) -> Row:
    """One row's comparison of log-probabilities, (tokens - 1, vocabulary) each."""
    kl = (base_log.exp() * (base_log - other_log)).sum(-1)
    return Row(
        kl=kl.mean().item(),
        top1=(base_log.argmax(-1) == other_log.argmax(-1)).float().mean().item(),
        base_nll=-base_log.gather(1, targets[:, None]).mean().item(),
        nll=-other_log.gather(1, targets[:, None]).mean().item(),
    )


def summarized(rows: list[Row], predictions: int) -> dict[str, Any]:
    values = {
        name: torch.tensor([asdict(row)[name] for row in rows], dtype=torch.float64)
        for name in asdict(rows[0])
    }
    return {
        "rows": len(rows),
        "predictions": predictions,
        "mean_kl_nats": values["kl"].mean().item(),
        "mean_kl_standard_error": (values["kl"].std() / math.sqrt(len(rows))).item(),
        "top1_agreement": values["top1"].mean().item(),
        "base_perplexity": values["base_nll"].mean().exp().item(),
        "perplexity": values["nll"].mean().exp().item(),
        "kl_by_row": [round(row.kl, 6) for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="KL divergence of a checkpoint from its base model.")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--token-ids", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--base-states", type=Path, help="keep the base model's last states here")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    base, other = load(arguments.base), load(arguments.base, arguments.checkpoint)
    ids = json.loads(arguments.token_ids.read_text(encoding="utf-8"))["input_ids"][: arguments.rows]
    with torch.inference_mode():
        rows = []
        for row, base_states in zip(ids, kept(base, ids, arguments.base_states), strict=True):
            base_log = base.lm_head(base_states)[:-1].log_softmax(-1)
            other_log = other.lm_head(last_states(other, [row])[0])[:-1].log_softmax(-1)
            rows.append(compare(base_log, other_log, torch.tensor(row[1:])))
    print(json.dumps(summarized(rows, sum(len(row) - 1 for row in ids))))


if __name__ == "__main__":
    main()
