"""Every family of `lowbit export --to gguf` in llama.cpp itself: its logits beside the checkpoint's own numbers'.

    python benchmarks/formats/llama_families.py --python PYTHON --work DIR \
        [--json benchmarks/formats/results/llama.json]

PYTHON has llama-cpp-python (benchmarks/runtimes/run.py says how it is made). Tiny seeded models, rounded to nearest:
W4A16 in groups of 32 (Q4_0) and W8A16 (Q8_0), the rest float16. llama.cpp rounds the inputs of every product to 8 bits
in blocks of 32 and has no switch for it, so that the two are near and not equal: the KL of random tiny models is given
and its median over positions is to stay below 0.01 nats: where rounding sends a token to another expert, it is larger.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.quantize.exports.checkpoints import checkpoint_of, float32_logits  # noqa: E402
from tests.quantize.exports.test_gguf_export import MODELS  # noqa: E402

from lowbit_quantize.export.exporter import export  # noqa: E402
from lowbit_quantize.export.gguf.target import Gguf  # noqa: E402

MEASURE = ROOT / "benchmarks" / "runtimes" / "measure.py"
IDS = [(37 * number) % 480 + 5 for number in range(96)]  # far enough for stretched positions to show
SCHEMES = {"W4A16": 32, "W8A16": 32}
MOST_KL = 0.01
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # which transformers does not read back
    "mixtral": ("mixtral", {"sliding_window": None}),
    "llama, positions divided by 4": ("llama", {"rope_parameters": LINEAR}),
    "gemma3_text, of full attention": (
        "gemma3_text",
        MODELS["gemma3_text"][1]
        | {
            "rope_parameters": {
                "full_attention": LINEAR | {"rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every family's GGUF in llama.cpp.")
    parser.add_argument("--python", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {}
    for name, (family, sizes) in (MODELS | OTHERS).items():
        for scheme, group in SCHEMES.items():
            place = arguments.work / f"{name} {scheme}".replace(" ", "-")
            found[f"{name}, {scheme}"] = one = _kl(arguments.python, place, family, sizes, scheme, group)
            print(f"{name}, {scheme}: {one}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(one["median"] > MOST_KL for one in found.values()))


def _kl(
    python: str, place: Path, family: str, sizes: dict[str, Any], scheme: str, group: int
) -> dict[str, float]:
    """Over positions, from the checkpoint's own numbers in float32."""
    place.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_of(place, family, {"scheme": scheme, "group_size": group}, sizes=sizes)
    file = place / "model.gguf"
    export(checkpoint, Gguf(), file)
    np.save(place / "rows.npy", np.array([IDS]))
    task = {"rows": str(place / "rows.npy"), "logits": str(place / "logits.npy")}
    (place / "task.json").write_text(json.dumps(task))
    command = [python, str(MEASURE), "llama.cpp", str(file), "--task", str(place / "task.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    ours = torch.from_numpy(float32_logits(checkpoint, IDS)).double().log_softmax(-1)
    theirs = torch.from_numpy(np.load(task["logits"])[0]).double()[:, : ours.shape[-1]].log_softmax(-1)
    by_position = (ours.exp() * (ours - theirs)).sum(-1)
    return {"mean": round(float(by_position.mean()), 7), "median": round(float(by_position.median()), 7)}


if __name__ == "__main__":
    sys.exit(main())
