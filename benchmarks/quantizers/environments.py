"""The environment of each tool: pinned, made at the first call, then reused. Standard library only.

Each entry of `PACKAGES` is a list of pip calls, one after the other. None of them touches another environment.
"""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "lowbit": (("--editable", f"{REPOSITORY}[quantize]", "torch==2.13.0"),),
    "llmcompressor": (
        (
            "torch==2.13.0",
            "llmcompressor==0.14.0.1",
            "transformers==5.17.0",
            "compressed-tensors==0.19.0",
        ),
    ),
    "autoawq": (("torch==2.13.0", "transformers==4.51.3", "autoawq==0.2.9"),),
    "autogptq": (("torch==2.13.0", "transformers==4.47.1", "peft==0.13.2", "auto-gptq==0.7.1"),),
    "autoround": (("torch==2.13.0", "transformers==5.19.0", "auto-round==0.16.1"),),
    # GPTQModel asks for a newer torch and transformers than vLLM 0.32 pins, and runs on these.
    "gptqmodel": (
        ("torch==2.13.0", "transformers==5.19.0", "accelerate>=1.10,<2", "optimum==2.3.0"),
        ("torch==2.13.0", "transformers==5.19.0", "compressed-tensors==0.17.0", "logbar", "tokenicer"),
        ("torch==2.13.0", "device-smi", "threadpoolctl", "pypcre", "defuser", "datasets", "pillow"),
        ("torch==2.13.0", "protobuf", "requests", "torchao", "dill"),
        ("--no-deps", "--no-build-isolation", "gptqmodel==7.7.0"),
    ),
}


def environment(tool: str, work: Path) -> Path:
    """The Python of a tool's environment under `work`."""
    home = work / f"venv-{tool}"
    python, stamp = home / "bin" / "python", home / "lowbit-benchmark.json"
    wanted = json.dumps(PACKAGES[tool])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        for packages in PACKAGES[tool]:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return python
