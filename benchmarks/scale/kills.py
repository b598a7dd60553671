"""Runs that are killed (SIGKILL) at random moments and then finished, compared byte for byte with one that was not.

    python benchmarks/scale/kills.py --out benchmarks/scale/results/NAME.json

The model is a tiny llama in a GGUF file, so that unpacking is one of the phases. The first runs are killed inside
each phase on purpose, the others at a random moment of a run's usual time. As root it also fills a disk (a tmpfs
of its own) under a run, makes room again, and lets it finish. Exits 1 when any file differs.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quantizers"))
from provenance import hardware, revision, versions
from tests.quantize.stoppable import Point, renaming, run, start
from tests.quantize.tiny_gguf import write_tiny_gguf

from lowbit_core.manifest import MANIFEST_NAME, PROGRESS_NAME
from lowbit_core.manifest_files import file_sha256
from lowbit_quantize.run.directory import STATE

ROOT = Path(__file__).resolve().parents[2]
DEPTH = 3
RUN_FIGURES = ("created", "run")
PHASES = {
    "unpack": Point("open", "scratch/base/model.safetensors.index.json"),
    "first layer": Point("open", "scratch/model-00001"),
    "between shard and record": renaming("layer-00001.json"),
    "middle": renaming("model-00003-of-00004"),
    "quality": renaming("quality.json"),
    "finish": renaming("model-00004-of-00004"),
}
SETTINGS = (
    "calibration.num_samples=8",
    "calibration.max_seq_length=64",
    "quality.num_samples=4",
    "quality.max_seq_length=64",
)
TMPFS_BYTES = 192 << 20


def command(model: Path, out: Path) -> list[str]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["quantize", "--model", str(model), "--recipe", "gptq-g64", "--out", str(out), *sets]


def contents(out: Path) -> dict[str, Any]:
    """Hashes of all files, and the manifest without what each run has of its own."""
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    files = {path.name: file_sha256(path) for path in out.iterdir() if path.name != MANIFEST_NAME}
    return files | {"manifest": {key: value for key, value in manifest.items() if key not in RUN_FIGURES}}


def phase_of(out: Path) -> str:
    """Where a run was killed, by what it left."""
    state = out / STATE
    records = len(list(state.glob("walk/layer-*.json")))
    shards = len(list(out.glob("model-*.safetensors")))
    if (out / MANIFEST_NAME).exists():
        return "after the manifest"
    if not (out / PROGRESS_NAME).exists():
        return "start"
    if not (state / "base").is_dir():
        return "unpack"
    if (state / "walk" / "quality.json").exists():
        return "finish"
    if records == DEPTH:
        return "quality"
    if shards > records:
        return "between shard and record"
    return "middle" if records else "first layer"


def killed_once(model: Path, work: Path, point: Point | None, moments: random.Random) -> dict[str, Any]:
    """Kill one run, at a point or after a random time; finish it and compare."""
    out, log = work / "out", work / "log"
    shutil.rmtree(out, ignore_errors=True)
    if point is not None:
        status, killed = run(command(model, out), log, kill_at=point)[0], "inside the phase"
    else:
        status, killed = _killed_in_time(model, out, log, moments)
    phase = phase_of(out)
    finished_layers = len(list((out / STATE).glob("walk/layer-*.json")))
    resumed, said = run(command(model, out), log)
    identical = resumed == 0 and contents(out) == contents(work / "straight")
    return {
        "killed": killed,
        "status": status,
        "phase": phase,
        "finished_layers": finished_layers,
        "went_on": f"going on after {finished_layers} of" in said or finished_layers in (0, DEPTH),
        "identical": identical,
    }


def _killed_in_time(model: Path, out: Path, log: Path, moments: random.Random) -> tuple[int | None, str]:
    """Kill a run a random time after it first wrote; one that had ended by then is done again, and sets the range."""
    longest_s = 10.0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        process = start(command(model, out), log)
        while process.is_alive() and not (out / PROGRESS_NAME).exists():
            time.sleep(0.002)
        after_s, begun = moments.uniform(0, longest_s), time.monotonic()
        process.join(after_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            return process.exitcode, f"after {after_s:.2f} s"
        longest_s = time.monotonic() - begun


def filled_disk(model: Path, work: Path) -> dict[str, Any]:
    """Fill the disk under a run when its first layer is done, then make room and run again."""
    with tmpfs(work / "disk") as disk:
        out, log = disk / "out", work / "log"
        process = start(command(model, out), log)
        while process.is_alive() and not (out / STATE / "walk" / "layer-00000.json").exists():
            time.sleep(0.002)
        with (disk / "filler").open("wb", buffering=0) as filler:
            try:
                for size in (1 << 20, 1 << 12):
                    for _ in range(TMPFS_BYTES // size):
                        filler.write(b"\0" * size)
            except OSError:
                pass
        process.join()
        said = log.read_text().strip().splitlines()[-1]
        (disk / "filler").unlink()
        resumed = run(command(model, out), log)[0]
        identical = resumed == 0 and contents(out) == contents(work / "straight")
        return {
            "status": process.exitcode,
            "said": said.replace(str(disk), "DISK"),
            "then_status": resumed,
            "identical": identical,
        }


@contextmanager
def tmpfs(directory: Path) -> Iterator[Path]:
    """A file system of its own in memory; needs root."""
    directory.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(directory)]
    subprocess.run(mount, check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    model = write_tiny_gguf(work / "model")
    run(command(model, work / "warm"), work / "log")
    begun = time.monotonic()
    assert run(command(model, work / "straight"), work / "log")[0] == 0
    usual_s = time.monotonic() - begun
    moments = random.Random(arguments.seed)
    points = [*PHASES.values(), *[None] * (arguments.runs - len(PHASES))]
    runs = []
    for point in points:
        runs.append(killed_once(model, work, point, moments))
        print(runs[-1], flush=True)
    disk = filled_disk(model, work) if os.geteuid() == 0 else None
    result = {
        "command": f"python benchmarks/scale/kills.py --runs {arguments.runs} --seed {arguments.seed}",
        "hardware": hardware(),
        "versions": versions(Path(sys.executable)),
        "revision": revision(ROOT),
        "usual_s": round(usual_s, 2),
        "phases": sorted({one["phase"] for one in runs}),
        "runs": runs,
        "filled_disk": disk,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(work)
    print("filled disk:", disk)
    good = all(one["identical"] and one["went_on"] and one["status"] == -9 for one in runs)
    covered = set(PHASES) <= set(result["phases"])
    return 0 if good and covered and (disk is None or (disk["status"], disk["identical"]) == (2, True)) else 1


if __name__ == "__main__":
    sys.exit(main())
