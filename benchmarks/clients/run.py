"""Real clients against a running `lowbit serve`: each a chat, a stream, and a tool call or a JSON-schema answer.

    python benchmarks/clients/run.py CHECKPOINT --work DIR --out benchmarks/clients/results/NAME.json

Makes environments for Python packages and a node_modules for others under DIR (needs pip, node, npm, a JDK and
curl), starts the server with an API key, and runs the scripts beside this one. Exit status 1 when a step of a client
failed; what a framework refused of the model's own text is counted apart: agent_clients.py says how it is told, and a
forced call that ended at its token limit is the model's.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.endpoint import lowbit_serve, write_result  # noqa: E402

MODEL = "smollm2"
PYTHON_PACKAGES = ("openai", "langchain-openai", "litellm", "llm")
FRAMEWORKS = {  # each in an environment of its own: together pip takes old versions of all
    "instructor": "instructor",
    "pydantic-ai": "pydantic-ai-slim[openai]",
    "openai-agents": "openai-agents",
    "llama-index": "llama-index-llms-openai-like",
}
CLIENTS = 12
NODE_PACKAGES = ("openai", "ai", "@ai-sdk/openai-compatible", "zod")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="environments and logs; reused")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    python = python_environment(work / "python", PYTHON_PACKAGES)
    frameworks = {name: python_environment(work / name, (package,)) for name, package in FRAMEWORKS.items()}
    node = node_environment(work)
    made = subprocess.run(
        [str(Path(sys.executable).with_name("lowbit")), "key", "clients"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    keys = arguments.work / "keys.yaml"
    keys.write_text(made, encoding="utf-8")
    flags = ("--served-model-name", MODEL, "--api-keys", str(keys), "--tool-call-parser", "hermes")
    with lowbit_serve(arguments.checkpoint, arguments.work / "serve.log", *flags) as server:
        environment = os.environ | {
            "CLIENT_URL": f"{server.url}/v1",
            "CLIENT_KEY": made.splitlines()[0].removeprefix("# "),
            "CLIENT_MODEL": MODEL,
            "LLM_USER_PATH": str(arguments.work / "llm"),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it asks the network for prices
        }
        steps = run([str(python), str(HERE / "python_clients.py")], environment)
        steps += run(["node", str(node / "node_clients.mjs")], environment)
        for name, its_python in frameworks.items():
            steps += run([str(its_python), str(HERE / "agent_clients.py"), name], environment)
        steps += run(["java", str(HERE / "JavaClient.java")], environment)
        steps += run([sys.executable, str(HERE / "curl_clients.py")], environment)
    tell_cut_calls(steps)
    versions = python_versions(python, PYTHON_PACKAGES) | node_versions(node)
    for name, its_python in frameworks.items():
        versions |= python_versions(its_python, (FRAMEWORKS[name],))
    write_result(arguments.out, {"model": MODEL, "versions": versions, "steps": steps})
    failed = [step for step in steps if not step["ok"]]
    for step in steps:
        outcome = step.get("outcome", "ok") if step["ok"] else "FAILED"
        print(f"{outcome:6} {step['client']:28} {step['step']:16} {step['detail']}")
    refused = [step for step in steps if step.get("outcome") == "model"]
    print(json.dumps({"steps": len(steps), "failed": len(failed), "model's text": len(refused)}))
    return 1 if failed or len({step["client"] for step in steps}) != CLIENTS else 0


def tell_cut_calls(steps: list[dict[str, Any]]) -> None:
    """Where the model's forced call runs into its token limit (blanks without end), clients find no call in it."""
    if any(step["step"] == "forced call" and step["detail"] == "length" for step in steps):
        for step in steps:
            if not step["ok"] and step["step"].startswith("tool "):
                step.update(ok=True, outcome="model")


def python_environment(directory: Path, packages: tuple[str, ...]) -> Path:
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def node_environment(work: Path) -> Path:
    """The directory with node_modules; the script is copied there, because Node looks for packages beside it."""
    directory = work / "node"
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "node_modules").exists():
        (directory / "package.json").write_text('{"private": true}')
        subprocess.run(["npm", "install", "--silent", *NODE_PACKAGES], cwd=directory, check=True)
    (directory / "node_clients.mjs").write_bytes((HERE / "node_clients.mjs").read_bytes())
    return directory


def run(command: list[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    """The lines of JSON that the clients print, one a step."""
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def python_versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    names = [name.partition("[")[0] for name in packages]
    script = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    command = [python, "-c", script, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {f"{name} (Python)": version for name, version in json.loads(done.stdout).items()}


def node_versions(directory: Path) -> dict[str, str]:
    found = {}
    for name in NODE_PACKAGES:
        package = json.loads((directory / "node_modules" / name / "package.json").read_text())
        found[f"{name} (npm)"] = package["version"]
    return found


if __name__ == "__main__":
    sys.exit(main())
