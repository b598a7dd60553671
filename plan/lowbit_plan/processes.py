"""Lowbit's other programs as processes of their own, as a user would run them: quantize, serve, loadtest."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit_core.errors import EngineError, LowbitError
from lowbit_core.server_process import free_port, last_words, running_server

LOWBIT = (sys.executable, "-c", "import sys; from lowbit_core.cli import main; sys.exit(main())")
MODEL = "checkpoint"
START_TIMEOUT_S = 900.0
MAX_LAG_S = 0.5  # of the generator, beside an engine on the same cores
REJECTED = 3  # quantize's status where the recipe's own gate rejects


@dataclass(frozen=True)
class Load:
    """A closed loop: `streams` at once, `requests` in all, prompts of `prompt` tokens and outputs of `output`."""

    streams: int
    requests: int
    prompt: int
    output: int
    seed: int = 1


def quantize(model: str, recipe: Path, out: Path, log: Path, *flags: str) -> None:
    """Make a checkpoint in `out`, or go on where a run left off; raises LowbitError where that fails."""
    command = [*LOWBIT, "quantize", "--model", model, "--recipe", str(recipe), "--out", str(out), *flags]
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status not in (0, REJECTED):
        raise LowbitError(f"lowbit quantize ended with status {status}: {last_words(log)}")


@contextmanager
def serving(directory: Path, log: Path, *flags: str) -> Iterator[str]:
    """The URL of a server of `directory`, not compiled, until the block ends; EngineError if none comes up."""
    port = free_port()
    command = [*LOWBIT, "serve", str(directory), "--port", str(port), "--served-model-name", MODEL]
    with running_server(
        [*command, "--enforce-eager", *flags], f"http://127.0.0.1:{port}", log, name="lowbit serve",
        timeout_s=START_TIMEOUT_S,
    ) as server:  # fmt: skip
        yield server.url


def load(url: str, one: Load, folder: Path) -> dict[str, Any]:
    """What `lowbit loadtest` measures; its files stay in `folder`."""
    scenario, out = folder / "load.yaml", folder / "load.json"
    document = {
        "arrivals": {"kind": "closed", "concurrency": one.streams},
        "prompts": {"kind": "synthetic", "tokens": one.prompt},
        "output": {"tokens": one.output, "exact": True},
        "requests": one.requests,
        "seed": one.seed,
        "generator": {"workers": 1, "max_lag_s": MAX_LAG_S},
    }
    scenario.write_text(json.dumps(document), encoding="utf-8")
    command = [*LOWBIT, "loadtest", "--target", url, "--scenario", str(scenario), "--json", str(out)]
    command += ["--endpoint", "/v1/completions"]  # no template: a prompt is as long as it is said to be
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise EngineError(f"lowbit loadtest ended with status {done.returncode}: {last[:300]}")
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def inter_token_s(result: dict[str, Any]) -> float:
    """The median time between two tokens of a stream."""
    return float(_measured(result, "inter_token_latency_s")["p50"])


def first_token_s(result: dict[str, Any]) -> float:
    """The median time to a first token."""
    return float(_measured(result, "ttft_s")["p50"])


def engine_facts(url: str) -> dict[str, Any]:
    """What the server says of its engine."""
    with urllib.request.urlopen(f"{url}/lowbit/checkpoint", timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)["engine"]
    return found


def weight_bytes(directory: Path) -> int:
    """Of the files with weights, and their index."""
    files: Sequence[Path] = [*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")]
    return sum(file.stat().st_size for file in files)


def _measured(result: dict[str, Any], name: str) -> dict[str, Any]:
    spread = result.get(name)
    if spread is None:
        outcomes = {key: count for key, count in result["outcomes"].items() if count}
        raise EngineError(f"lowbit loadtest measured no {name}; outcomes: {outcomes}")
    found: dict[str, Any] = spread
    return found
