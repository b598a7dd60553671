"""An hour of clients as they are: does the server's memory grow, and has it counted what the clients saw?

    python benchmarks/soak/run.py --work DIR --out benchmarks/soak/results/mock.json                      # 60 minutes
    python benchmarks/soak/run.py --checkpoint DIR --minutes 15 --rate 2 --work DIR --out ….json

Without a checkpoint the engine is benchmarks/mock_engine.py behind the whole of `lowbit serve`. `churn.py` has the
kinds of clients. Meanwhile the key file changes every few seconds: other limits, other names, and a broken file. Memory
is resident memory of the API's process (and of the engine's) every 5 s; its slope is fitted to all but the first
quarter. Before the clock starts, `AT_FIRST` requests come at once: an allocator keeps what its busiest moment took, and
on a slow machine that moment would otherwise come in the measured part.
Exit status 1 where the API's slope is above 0.1 MB/min, an answer was another than due, or a counter differs.
"""

import argparse
import asyncio
import hashlib
import json
import secrets
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import PYTHON, lowbit_serve, running, write_result  # noqa: E402
from benchmarks.mock_engine import MODEL, folder  # noqa: E402
from benchmarks.soak.churn import LONG, Clients, Expected  # noqa: E402

BOUND_MB_PER_MINUTE = 0.1
SAMPLE_S, KEYS_S = 5.0, 7.0
AT_ONCE, AT_FIRST = 400, 100
SETTLE_S = 15.0  # after the last request: the server's own bounds for what nobody ends
NAMES = ("whole", "churn", "one", "admin")
FLAGS = (
    "--served-model-name", MODEL, "--max-output-tokens", "2048", "--max-body-bytes", str(2 << 20),
    "--request-timeout-s", "300", "--max-num-queued-tokens", "100000", "--max-prompt-characters", "20000",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=10.0, help="requests started in a second")
    parser.add_argument(
        "--long", type=int, default=LONG, help="tokens of a request that is left or timed out"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    keys = {name: f"lb-{secrets.token_urlsafe(32)}" for name in NAMES}
    write_keys(work / "keys.yaml", keys, 0)
    flags = (*FLAGS, "--api-keys", str(work / "keys.yaml"))
    log = work / "serve.log"
    if arguments.checkpoint is None:
        mock = [str(PYTHON), str(ROOT / "benchmarks" / "mock_engine.py"), "serve", str(folder(work / "mock"))]
        started = running([*mock, *flags], log, "/readyz")
    else:
        started = lowbit_serve(arguments.checkpoint, log, *flags)
    with started as server:
        port = int(server.url.rpartition(":")[2])
        clients = Clients(port, keys, MODEL, arguments.checkpoint is None, arguments.seed, arguments.long)
        process = psutil.Process(server.process.pid)
        seconds = arguments.minutes * 60
        asyncio.run(warm(clients))
        samples = asyncio.run(soak(clients, process, work / "keys.yaml", seconds, arguments.rate))
        counted = asyncio.run(scrape(clients))
    return judged(arguments, clients.expected, samples, counted)


def write_keys(path: Path, keys: dict[str, str], number: int) -> None:
    """The key file's `number`-th state: limits that nobody reaches change, and the key `churn` has another name."""
    limits = {
        "requests_per_minute": 10**6 * (1 + number % 3),
        "tokens_per_minute": 10**9,
        "priority": number % 2,
    }
    named = {"whole": "whole", "churn": f"churn-{number % 20}", "one": "one", "admin": "admin"}
    more: dict[str, dict[str, Any]] = {
        "whole": {}, "churn": limits, "one": {"concurrent_requests": 1}, "admin": {"admin": True}
    }  # fmt: skip
    entries = [
        {"name": named[name], "sha256": hashlib.sha256(secret.encode()).hexdigest(), **more[name]}
        for name, secret in keys.items()
    ]
    path.write_text("keys: [" if number % 5 == 4 else yaml.safe_dump({"keys": entries}))


async def warm(clients: Clients) -> None:
    """Once the busiest that the server will be, with requests that end well."""
    await asyncio.gather(
        *(clients.one((clients.whole, clients.stream)[number % 2]) for number in range(AT_FIRST))
    )


async def soak(
    clients: Clients, process: psutil.Process, keys: Path, seconds: float, rate: float
) -> list[dict[str, float]]:
    """Requests at a steady rate until the time is over and the last of them has ended; returns memory over time."""
    began = time.monotonic()
    samples: list[dict[str, float]] = []
    beside = [
        asyncio.create_task(sample(process, began, samples)),
        asyncio.create_task(change_keys(keys, clients.keys)),
    ]
    tasks: set[asyncio.Task[None]] = set()
    due = began
    while time.monotonic() - began < seconds:
        due += 1 / rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        if len(tasks) < AT_ONCE:
            task = asyncio.create_task(clients.one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    for one in beside:
        one.cancel()
    await asyncio.gather(*tasks, *beside, return_exceptions=True)
    write_keys(keys, clients.keys, 0)
    await asyncio.sleep(SETTLE_S)
    return samples


async def sample(process: psutil.Process, began: float, samples: list[dict[str, float]]) -> None:
    while True:
        children = sum(_rss(one) for one in process.children(recursive=True))
        samples.append({
            "minutes": round((time.monotonic() - began) / 60, 3), "api_mb": round(_rss(process), 3),
            "engine_mb": round(children, 3), "connections": process.num_fds(),
        })  # fmt: skip
        await asyncio.sleep(SAMPLE_S)


def _rss(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 1e6
    except psutil.Error:
        return 0.0


async def change_keys(path: Path, keys: dict[str, str]) -> None:
    number = 0
    while True:
        await asyncio.sleep(KEYS_S)
        number += 1
        write_keys(path, keys, number)


async def scrape(clients: Clients) -> dict[str, Any]:
    """What the server has counted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", clients.port)
    head = f"Host: a\r\nAuthorization: Bearer {clients.keys['admin']}\r\nConnection: close\r\n\r\n"
    writer.write(f"GET /metrics HTTP/1.0\r\n{head}".encode())
    text = (await reader.read(-1)).partition(b"\r\n\r\n")[2].decode()
    writer.close()
    found: dict[str, Counter[str]] = {"outcomes": Counter(), "rejections": Counter()}
    totals = {"whole_tokens": 0, "active": 0}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name == "lowbit_requests_total":
                found["outcomes"][one.labels["outcome"]] += int(one.value)
            elif one.name == "lowbit_rejections_total":
                found["rejections"][one.labels["reason"]] += int(one.value)
            elif one.name == "lowbit_requests_active":
                totals["active"] = int(one.value)
            elif one.name == "lowbit_key_tokens_total" and one.labels == {
                "key": "whole",
                "kind": "generated",
            }:
                totals["whole_tokens"] = int(one.value)
    return {**{name: dict(counts) for name, counts in found.items()}, **totals}


def judged(
    arguments: argparse.Namespace,
    expected: Expected,
    samples: list[dict[str, float]],
    counted: dict[str, Any],
) -> int:
    late = [one for one in samples if one["minutes"] >= arguments.minutes / 4]
    slopes = {name: slope(late, f"{name}_mb") for name in ("api", "engine")}
    due = {
        "outcomes": dict(expected.outcomes), "rejections": dict(expected.rejections),
        "whole_tokens": expected.whole_tokens, "active": 0,
    }  # fmt: skip
    differs = {
        name: {"due": due[name], "counted": counted[name]} for name in due if due[name] != counted[name]
    }
    result = {
        "engine": "mock" if arguments.checkpoint is None else arguments.checkpoint.name, "minutes": arguments.minutes,
        "rate": arguments.rate, "seed": arguments.seed, "requests": expected.requests, "kinds": expected.kinds,
        "mb_per_minute": slopes, "bound_mb_per_minute": BOUND_MB_PER_MINUTE, "counted": counted, "differs": differs,
        "wrong": expected.wrong[:50], "wrong_in_all": len(expected.wrong),
        "samples": samples[:: max(1, len(samples) // 120)],
    }  # fmt: skip
    write_result(arguments.out, result)
    shown = ("requests", "mb_per_minute", "counted", "differs", "wrong_in_all")
    print(json.dumps({name: result[name] for name in shown}))
    return 0 if slopes["api"] <= BOUND_MB_PER_MINUTE and not differs and not expected.wrong else 1


def slope(samples: list[dict[str, float]], name: str) -> float:
    """Megabytes a minute, by least squares."""
    minutes = [one["minutes"] for one in samples]
    return round(statistics.linear_regression(minutes, [one[name] for one in samples]).slope, 4)


if __name__ == "__main__":
    sys.exit(main())
