"""`lowbit serve` at ten times what it can do: every request answered 200 or 429, and the admitted ones no slower.

    python benchmarks/overload/run.py CHECKPOINT --out benchmarks/overload/results/NAME.json

**Capacity** is measured closed loop with as many requests open as the server admits (`--places`): it is full, and
refuses none. **Overload** is open loop: ten times the rate at which requests ended then, evenly spaced, whatever comes
back. Capacity is measured before and after, and the two together are compared with the overload. Each
request has a prompt of its own and exactly `--tokens` answer tokens. The client runs on the same machine and takes
CPU from the server, more so in the overload.
"""

import argparse
import asyncio
import json
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import lowbit_serve, write_result  # noqa: E402
from benchmarks.http_load import Answer, post, quantile  # noqa: E402

MODEL = "smollm2"
FACTOR = 10
MOST_RATIO = 1.3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--places", type=int, default=16, help="requests that the server admits at once")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="of the overload")
    parser.add_argument("--capacity-seconds", type=float, default=40)
    parser.add_argument("--log", type=Path, default=Path("/tmp/lowbit-overload.log"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    flags = ("--served-model-name", MODEL, "--max-num-queued-reqs", str(arguments.places), "--no-request-log")
    with lowbit_serve(arguments.checkpoint, arguments.log, *flags) as server:
        load = Load(f"{server.url}/v1/chat/completions", arguments.tokens)
        asyncio.run(load.closed(arguments.places, 8))  # warm up
        before = asyncio.run(load.closed(arguments.places, arguments.capacity_seconds))
        rate = FACTOR * len(before) / arguments.capacity_seconds
        overload = asyncio.run(load.open(rate, arguments.seconds))
        after = asyncio.run(load.closed(arguments.places, arguments.capacity_seconds))
        alive = server.process.poll() is None
    at_capacity = before + after
    ratio = p99(overload) / p99(at_capacity)
    result = {
        "places": arguments.places, "tokens": arguments.tokens, "offered_rps": round(rate, 2),
        "seconds": arguments.seconds, "server_alive": alive, "p99_ratio": round(ratio, 3),
        "capacity_before": summary(before), "overload": summary(overload), "capacity_after": summary(after),
    }  # fmt: skip
    write_result(arguments.out, result)
    print(json.dumps(result))
    only = {answer.status for answer in overload} == {200, 429}
    return 0 if alive and only and ratio <= MOST_RATIO else 1


class Load:
    """Requests with prompts of their own."""

    def __init__(self, url: str, tokens: int) -> None:
        self._url, self._tokens, self._random = url, tokens, random.Random(1)

    async def one(self) -> Answer:
        words = " ".join(str(self._random.randrange(1000)) for _ in range(16))
        body: dict[str, Any] = {
            "model": MODEL, "messages": [{"role": "user", "content": f"Tell a story about {words}."}],
            "max_tokens": self._tokens, "ignore_eos": True,
        }  # fmt: skip
        return await post(self._url, body, {})

    async def closed(self, places: int, seconds: float) -> list[Answer]:
        """Answers that ended within `seconds`, with `places` requests open all the time."""
        answers: list[Answer] = []
        end = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end:
                answer = await self.one()
                if time.monotonic() < end:
                    answers.append(answer)

        await asyncio.gather(*(client() for _ in range(places)))
        return answers

    async def open(self, rate: float, seconds: float) -> list[Answer]:
        """All answers to requests sent at `rate` a second, each at its time."""
        began, tasks = time.monotonic(), []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            tasks.append(asyncio.create_task(self.one()))
        return list(await asyncio.gather(*tasks))


def admitted(answers: list[Answer]) -> list[float]:
    return [answer.seconds for answer in answers if answer.status == 200]


def p99(answers: list[Answer]) -> float:
    return quantile(admitted(answers) or [math.nan], 0.99)


def summary(answers: list[Answer]) -> dict[str, Any]:
    times = admitted(answers) or [math.nan]
    refused = [answer.seconds for answer in answers if answer.status == 429]
    return {
        "requests": len(answers),
        "statuses": dict(Counter(str(answer.status) for answer in answers)),
        "admitted_median_s": round(quantile(times, 0.5), 3),
        "admitted_p99_s": round(quantile(times, 0.99), 3),
        "refused_p99_s": round(quantile(refused, 0.99), 4) if refused else None,
    }


if __name__ == "__main__":
    sys.exit(main())
