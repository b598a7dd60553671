"""REAP here beside llm-compressor's REAPPruningModifier: the same tokens, which experts stay, and what it costs.

    python benchmarks/experts/reap_peer.py MODEL --rows 4 --heldout-rows 4 --out benchmarks/experts/results/NAME.json

MODEL and its text are those of run.py. llm-compressor runs in its own environment under `--work`, made once. Both
pruned models are written as directories, opened by plain transformers in bfloat16, and compared with the base on the
held-out rows by one evaluator; the head is float32.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1] / "quantizers"))  # which has a run.py too
from environments import REPOSITORY, environment
from provenance import hardware, revision, sha256, versions
from run import SHARES, pruning, text_of
from walked import kept_experts, walked

from lowbit_quantize.quality.dataset import TokenText
from lowbit_quantize.quality.kl import compare, figures

FORWARD_ROWS = 4  # in one pass
Kept = dict[int, list[int]]


def main() -> None:
    arguments = _arguments()
    held = json.loads((arguments.model / "held.json").read_text(encoding="utf-8"))
    calibration, heldout = (
        text_of(held, 0, arguments.rows, None),
        text_of(held, 1, arguments.heldout_rows, None),
    )
    python = environment("llmcompressor", arguments.work)
    base = last_states(arguments.model, heldout.ids)
    runs = []
    for share in SHARES:
        ours, ours_cpu_s = prune_here(arguments.model, share, calibration, heldout, arguments.work / "lowbit")
        theirs, their_cpu_s = prune_there(
            python, arguments.model, share, calibration, arguments.work / "peer"
        )
        runs.append(
            {
                "pruned": share,
                "kept_by_both": sum(len(set(ours[layer]) & set(theirs[layer])) for layer in ours),
                "kept": sum(map(len, ours.values())),
                "lowbit": judged(base, arguments.work / "lowbit", heldout) | {"cpu_s": ours_cpu_s},
                "llm-compressor": judged(base, arguments.work / "peer", heldout) | {"cpu_s": their_cpu_s},
                "kept_by_layer": {"lowbit": ours, "llm-compressor": theirs},
            }
        )
        print(
            json.dumps({key: value for key, value in runs[-1].items() if key != "kept_by_layer"}), flush=True
        )
    result = {
        "model": arguments.model.name,
        "model_sha256": sha256([arguments.model / "model.safetensors"]),
        "revision": revision(REPOSITORY),
        "hardware": hardware(),
        "versions": {"lowbit": versions(Path(sys.executable)), "llm-compressor": versions(python)},
        "calibration_rows": len(calibration.ids),
        "heldout_rows": len(heldout.ids),
        "runs": runs,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="model directory with held.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".bench" / "experts")
    parser.add_argument("--rows", type=int, default=8, help="calibration rows of each domain")
    parser.add_argument("--heldout-rows", type=int, default=8, help="held-out rows of each domain")
    return parser.parse_args()


def prune_here(
    model: Path, share: float, calibration: TokenText, heldout: TokenText, out: Path
) -> tuple[Kept, float]:
    """Prune into `out`; which experts stay, and CPU seconds without the comparison at the end."""
    started_s = time.process_time()
    walk = walked(model, {"passes": [pruning(share, "reap")]}, (calibration, heldout), out)
    return kept_experts(walk), round(time.process_time() - started_s, 1)


def prune_there(
    python: Path, model: Path, share: float, calibration: TokenText, out: Path
) -> tuple[Kept, float]:
    """The same by llm-compressor in its environment; CPU seconds of its whole process."""
    out.mkdir(parents=True, exist_ok=True)
    tokens = out / "tokens.json"
    tokens.write_text(json.dumps({"input_ids": calibration.ids.tolist()}), encoding="utf-8")
    program = Path(__file__).with_name("reap_program.py")
    command: list[str | Path] = [python, program, "--model", model, "--token-ids", tokens, "--out", out]
    command += ["--sparsity", str(share), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    kept = json.loads((out / "kept.json").read_text(encoding="utf-8"))
    by_layer = {int(re.findall(r"\d+", name)[0]): sorted(numbers) for name, numbers in kept.items()}
    return by_layer, json.loads(done.stdout.splitlines()[-1])["program_cpu_s"]


def last_states(model: Path, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Normed last hidden states, (rows, tokens, hidden), and the head of a model as plain transformers runs it."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    with torch.inference_mode():
        states = [loaded.model(rows).last_hidden_state for rows in ids.split(FORWARD_ROWS)]
    return torch.cat(states), loaded.lm_head.weight.detach()


def judged(base: tuple[Tensor, Tensor], model: Path, heldout: TokenText) -> dict[str, float]:
    """How far a directory is from the base, both with the base's head."""
    states, head = last_states(model, heldout.ids)
    assert torch.equal(head, base[1]), f"{model} has another head"
    same = torch.nn.Identity()
    found = figures(compare(base[0], states, same, same, head, heldout.ids))
    return {name: found[name] for name in ("mean_kld", "kld_stderr", "top1_agreement", "perplexity_ratio")}


if __name__ == "__main__":
    main()
