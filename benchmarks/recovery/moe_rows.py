"""Rows of token ids for the small mixture (calibration, held-out, those that train), and the steps that take them.

    python benchmarks/recovery/moe_rows.py MODEL TEXT.jsonl.gz OUT [--rows N]

MODEL has `held.json`, token ids by domain (benchmarks/experts). The second half of each domain judges. The first half,
but for rows that share 64 tokens in a row with it, calibrates the pruning (calibration.json) and trains, beside N rows
of TEXT (scripts/build_training_text.py) and of the bundled calibration text (training.json). steps.yaml is a file for
`lowbit compose`: a quarter of the experts pruned, all weights taught, 4 bits, scales taught.
"""

import argparse
import json
from pathlib import Path

import torch
import yaml

from lowbit_quantize.model.reference import find_model
from lowbit_quantize.quality.dataset import TokenText
from lowbit_quantize.quality.overlap import token_runs
from lowbit_recover.distill.settings import Settings
from lowbit_recover.distill.texts import load_training

ROW_TOKENS = 512
PRUNE = {"passes": [{"prune_experts": {"prune_ratio": 0.25, "criterion": "reap"}}]}
ROUND = {"modules": [{"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["gptq"]}]}
LEARN = {"data": "training.json", "batch": 8, "micro_batch": 4, "evaluate_every": 8}
STEPS = {
    "steps": [
        {"quantize": {"recipe": "prune.yaml"}},
        {"distill": {**LEARN, "train": "weights", "tokens": 160_000, "learning_rate": 0.003}},
        {"quantize": {"recipe": "round.yaml"}},
        {"distill": {**LEARN, "train": "scales", "tokens": 64_000, "learning_rate": 0.003}},
    ]
}


def halves(held: dict[str, list[int]]) -> list[list[tuple[list[int], str]]]:
    """Rows of the first and of the second half of each domain."""
    found: list[list[tuple[list[int], str]]] = [[], []]
    for name, tokens in held.items():
        middle = len(tokens) // 2
        for half, part in enumerate((tokens[:middle], tokens[middle:])):
            rows = torch.tensor(part[: len(part) // ROW_TOKENS * ROW_TOKENS]).view(-1, ROW_TOKENS).tolist()
            found[half] += [(row, name) for row in rows]
    return found


def write(path: Path, rows: list[tuple[list[int], str]]) -> None:
    data = {"input_ids": [row for row, _ in rows], "domains": [name for _, name in rows]}
    path.write_text(json.dumps(data), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1024, help="of TEXT and of the bundled text")
    arguments = parser.parse_args()
    first, second = halves(json.loads((arguments.model / "held.json").read_text(encoding="utf-8")))
    seen = token_runs(torch.tensor([row for row, _ in second]))
    first = [one for one in first if token_runs(torch.tensor([one[0]])).isdisjoint(seen)]
    settings = Settings("weights", tokens=arguments.rows * ROW_TOKENS, row_tokens=ROW_TOKENS, batch=8)
    reference = find_model(str(arguments.model))
    held = TokenText(torch.tensor([row for row, _ in second]), (), None)  # type: ignore[arg-type]
    texts = load_training(
        [arguments.text, "default"], settings, held, [], reference.tokenizer(), reference.config.vocab_size
    )
    more = list(zip(texts.training.ids.tolist(), texts.training.domains, strict=True))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(arguments.out / "calibration.json", first)
    write(arguments.out / "heldout.json", second)
    write(arguments.out / "training.json", first + more)
    texts_of = {"calibration": {"token_ids": "calibration.json"}, "quality": {"token_ids": "heldout.json"}}
    for name, keys in (("prune", PRUNE), ("round", ROUND)):
        content = yaml.safe_dump({**keys, **texts_of, "kv_cache": "none"}, sort_keys=False)
        (arguments.out / f"{name}.yaml").write_text(content, encoding="utf-8")
    (arguments.out / "steps.yaml").write_text(yaml.safe_dump(STEPS, sort_keys=False), encoding="utf-8")
    print(f"{len(first)} rows calibrate, {len(second)} judge, {len(first) + len(more)} train")


if __name__ == "__main__":
    main()
