"""Where a figure comes from: hardware, versions, git revision and hashes. Standard library only."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERSIONED = (
    "torch",
    "transformers",
    "compressed-tensors",
    "numpy",
    "llmcompressor",
    "lowbit",
    "autoawq",
    "auto-round",
    "auto-gptq",
    "gptqmodel",
    "optimum",
)


def sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def versions(python: Path) -> dict[str, str]:
    """Installed versions in one environment, and its Python's."""
    script = (
        "import importlib.metadata as m, json, platform, sys\n"
        "names = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "found = {n: names[n] for n in sys.argv[1:] if n in names}\n"
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    printed = subprocess.run([python, "-c", script, *VERSIONED], check=True, capture_output=True, text=True)
    return dict(json.loads(printed.stdout))


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


def revision(repository: Path) -> str:
    """The git revision, marked when the checkout has changes."""
    git = ["git", "-C", str(repository)]
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain"], check=True, capture_output=True, text=True
    ).stdout
    return f"{head}+changes" if changed else head
