"""Peak memory and time per layer on a checkpoint larger than what is held in memory, seen from outside the process.

    python benchmarks/scale/run.py --out benchmarks/scale/results/NAME.json

writes a synthetic checkpoint (synthetic.py) under `--work`, quantizes it whole and at a quarter of its depth, and
compares the peak resident memory with the bound

    1.25 x (embedding + head + 2 x largest layer + calibration streams) + 1.5 GB

The kernel's figure (`ru_maxrss`, by wait4) is the one that counts; psutil's samples say what each layer had. Exits 1
when the bound is passed or layers get slower with depth.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from synthetic import INDEX, write_synthetic

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quantizers"))
from provenance import hardware, revision, versions

ROOT = Path(__file__).resolve().parents[2]
BOUND_FACTOR, BOUND_REST_BYTES = 1.25, 1.5e9
SAMPLE_EVERY_S = 0.02
GROWTH = 1.15  # of CPU seconds a layer, from the first quarter to the last
ROW_TOKENS = 512
ROWS, HELDOUT_ROWS = 4, 2


@dataclass
class Run:
    """One quantize process as it looked from outside; lists have an entry for each layer."""

    layers: int
    method: str
    base_bytes: int
    output_bytes: int
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int  # ru_maxrss
    sampled_peak_rss_bytes: int
    bound_bytes: int
    streams_bytes: int
    load_average: float
    layer_wall_s: list[float] = field(default_factory=list)
    layer_cpu_s: list[float] = field(default_factory=list)
    layer_peak_rss_bytes: list[int] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """CPU seconds of a layer of the last quarter over one of the first, the first layer apart."""
        later = self.layer_cpu_s[1:]
        part = max(1, len(later) // 4)
        return (sum(later[-part:]) / part) / (sum(later[:part]) / part)


def main() -> int:
    arguments = _arguments()
    model = arguments.work / "model"
    write_synthetic(model, arguments.layers, arguments.hidden, arguments.intermediate, arguments.vocabulary)
    depths = [arguments.layers] if arguments.one else [max(4, arguments.layers // 4), arguments.layers]
    runs = []
    for depth in depths:
        runs.append(measured(part_of(model, depth), depth, arguments))
        _write(arguments, runs)  # a long run that is stopped leaves what was measured
    for run in runs:
        print(
            f"{run.layers} layers, {run.method}: {run.base_bytes / 1e9:.2f} GB, "
            f"peak {run.peak_rss_bytes / 1e9:.2f} GB of {run.bound_bytes / 1e9:.2f} GB allowed, "
            f"{run.wall_s:.0f} s, {run.cpu_s:.0f} CPU s, growth {run.growth:.2f}"
        )
    if not arguments.keep:
        shutil.rmtree(arguments.work)
    bounded = all(run.peak_rss_bytes < run.bound_bytes for run in runs)
    return 0 if bounded and runs[-1].growth < GROWTH else 1


def _write(arguments: argparse.Namespace, runs: list[Run]) -> None:
    result = {
        "command": f"python benchmarks/scale/run.py --layers {arguments.layers} --recipe {arguments.recipe}",
        "hardware": hardware(),
        "versions": versions(Path(sys.executable)),
        "revision": revision(ROOT),
        "bound": "1.25 x (embedding + head + 2 x largest layer + calibration streams) + 1.5 GB",
        "runs": [{**asdict(run), "growth": round(run.growth, 3)} for run in runs],
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "scale")
    parser.add_argument("--layers", type=int, default=44)
    for name, width in (("hidden", 2048), ("intermediate", 8192), ("vocabulary", 128_256)):
        parser.add_argument(f"--{name}", type=int, default=width)
    parser.add_argument("--recipe", default="rtn-g64")
    parser.add_argument("--one", action="store_true", help="the whole depth alone")
    parser.add_argument("--keep", action="store_true", help="leave the synthetic checkpoint")
    return parser.parse_args()


def part_of(model: Path, layers: int) -> Path:
    """The same files as a model of its first `layers` layers."""
    part = model.with_name(f"model-{layers}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for path in model.iterdir():
        (part / path.name).symlink_to(path)
    config = json.loads((model / "config.json").read_text())
    (part / "config.json").unlink()
    (part / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    index = json.loads((model / INDEX).read_text())
    kept = {
        name: file
        for name, file in index["weight_map"].items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    (part / INDEX).unlink()
    (part / INDEX).write_text(json.dumps({**index, "weight_map": kept}))
    return part


def measured(model: Path, layers: int, arguments: argparse.Namespace) -> Run:
    """Quantize `model` in a process of its own, and watch it."""
    out = arguments.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        str(Path(sys.executable).with_name("lowbit")),
        "quantize",
        "--model",
        str(model),
        "--out",
        str(out),
    ]
    for setting in (
        f"calibration.num_samples={ROWS}",
        f"quality.num_samples={HELDOUT_ROWS}",
        f"calibration.max_seq_length={ROW_TOKENS}",
        f"quality.max_seq_length={ROW_TOKENS}",
    ):
        command += ["--set", setting]
    load_average, started_s = os.getloadavg()[0], time.time()
    with (arguments.work / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--recipe", arguments.recipe], stdout=log, stderr=log)
        samples = _watch(process.pid, out)
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"quantize ended with {os.waitstatus_to_exitcode(status)}: {arguments.work / 'log'}")
    streams_bytes = samples["streams_bytes"]
    return Run(
        layers=layers,
        method=arguments.recipe,
        base_bytes=sum(path.stat().st_size for path in {file.resolve() for file in _weights(model)}),
        output_bytes=sum(path.stat().st_size for path in out.glob("*.safetensors")),
        wall_s=round(time.time() - started_s, 1),
        cpu_s=round(usage.ru_utime + usage.ru_stime, 1),
        peak_rss_bytes=usage.ru_maxrss * 1024,
        sampled_peak_rss_bytes=samples["peak"],
        bound_bytes=bound(model, streams_bytes),
        streams_bytes=streams_bytes,
        load_average=round(load_average, 2),
        **{key: samples[key] for key in ("layer_wall_s", "layer_cpu_s", "layer_peak_rss_bytes")},
    )


def _weights(model: Path) -> list[Path]:
    return [model / file for file in set(json.loads((model / INDEX).read_text())["weight_map"].values())]


def bound(model: Path, streams_bytes: int) -> int:
    """The stated bound, from the configuration and the shards' sizes."""
    sizes = sorted(path.stat().st_size for path in _weights(model))
    *layers, first_outside, second_outside = sizes  # embedding and head are the two largest
    held = first_outside + second_outside + 2 * layers[-1] + streams_bytes
    return int(BOUND_FACTOR * held + BOUND_REST_BYTES)


def _watch(pid: int, out: Path) -> dict[str, Any]:
    """Sample a process until it ends; a layer ends when its record appears."""
    watched = psutil.Process(pid)
    seen: dict[str, Any] = {"peak": 0, "streams_bytes": 0}
    seen |= {"layer_wall_s": [], "layer_cpu_s": [], "layer_peak_rss_bytes": []}
    wall_s, cpu_s, peak, started = 0.0, 0.0, 0, False
    records = out / ".run" / "walk"
    while True:
        try:
            if watched.status() == psutil.STATUS_ZOMBIE:
                return seen
            rss, times = watched.memory_info().rss, watched.cpu_times()
        except psutil.NoSuchProcess:
            return seen
        seen["peak"], peak = max(seen["peak"], rss), max(peak, rss)
        now_cpu_s = times.user + times.system
        if not started and records.is_dir():  # the walk begins
            started, wall_s, cpu_s, peak = True, time.monotonic(), now_cpu_s, rss
        if (records / f"layer-{len(seen['layer_wall_s']):05d}.json").exists():
            streams = [path.stat().st_size for path in records.glob("streams-*")]
            seen["streams_bytes"] = max([seen["streams_bytes"], *streams])
            seen["layer_wall_s"].append(round(time.monotonic() - wall_s, 2))
            seen["layer_cpu_s"].append(round(now_cpu_s - cpu_s, 2))
            seen["layer_peak_rss_bytes"].append(peak)
            wall_s, cpu_s, peak = time.monotonic(), now_cpu_s, rss
        time.sleep(SAMPLE_EVERY_S)


if __name__ == "__main__":
    sys.exit(main())
