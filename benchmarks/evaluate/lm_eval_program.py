"""lm-evaluation-harness on local tasks, in its own environment: every item's acc and acc_norm as JSON.

python lm_eval_program.py TASKS_DIR hf|local-completions '{"pretrained": …}' BATCH NAME...
"""

import json
import os
import sys
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import lm_eval
from lm_eval.tasks import TaskManager


def main(folder: str, kind: str, model_args: dict[str, Any], batch: int, names: list[str]) -> None:
    if kind == "hf":
        model_args["device"] = "cpu"
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=model_args,
        tasks=[f"lowbit_{name}" for name in names],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        batch_size=batch,
        log_samples=True,
        bootstrap_iters=0,
    )
    metrics = ("acc", "acc_norm")
    judged = {
        name: {
            sample["doc"]["id"]: {metric: float(sample[metric]) for metric in metrics if metric in sample}
            for sample in found["samples"][f"lowbit_{name}"]
        }
        for name in names
    }
    print(json.dumps(judged))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
