"""`lowbit serve` with a usage file, as processes: counts over restarts, a kill, and two servers on one file.

vLLM's place has benchmarks/mock_engine.py; everything else is the server.
"""

import http.client
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.mock_engine import folder
from tests.server.gateway.key_files import key_file

from lowbit_core.server_process import ServerProcess, free_port, running_server
from lowbit_server.cost.usage_book import WRITE_S
from lowbit_server.cost.usage_file import Counts, read_rows, reading

ROOT = Path(__file__).resolve().parents[3]
BUSY_S = 0.5  # a write on a slow machine


@contextmanager
def serving(work: Path) -> Iterator[ServerProcess]:
    port = free_port()
    keys = work / "keys.yaml"
    if not keys.exists():
        key_file(keys, {"name": "a"}, {"name": "b"}, {"name": "limited", "tokens_per_month": 60})
    command = [
        sys.executable, str(ROOT / "benchmarks" / "mock_engine.py"), "serve", str(folder(work / "mock")),
        "--port", str(port), "--api-keys", str(keys), "--usage-file", str(work / "usage.db"), "--no-request-log",
    ]  # fmt: skip
    with running_server(command, f"http://127.0.0.1:{port}", work / f"{port}.log") as server:
        yield server


def chat(server: ServerProcess, key: str, tokens: int) -> Counts:
    """One streamed answer, and what it says that it used."""
    body = {
        "messages": [{"role": "user", "content": "hello " * tokens}], "max_tokens": tokens, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {key}-secret"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    assert lines[-2] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    (usage,) = [event["usage"] for event in events if event.get("usage")]
    return Counts(1, usage["prompt_tokens"], usage["completion_tokens"])


def counted(work: Path) -> dict[str, Counts]:
    with reading(work / "usage.db") as connection:
        rows = read_rows(connection)
    assert {month for month, _ in rows} <= {f"{datetime.now(UTC):%Y-%m}"}
    return {key: counts for (_, key), counts in rows.items()}


def test_monthly_counts_equal_the_clients_after_two_restarts_and_a_kill(tmp_path: Path) -> None:
    sums: Counter[str] = Counter()
    expected: dict[str, Counts] = {}

    def ask(server: ServerProcess) -> None:
        for key, tokens in (("a", 3), ("b", 7), ("a", 5)):
            expected[key] = expected.get(key, Counts()) + chat(server, key, tokens)
            sums[key] += 1

    with serving(tmp_path) as server:
        ask(server)  # and stopped at once: what is not written yet is written at the end
    assert counted(tmp_path) == expected
    with serving(tmp_path) as server:
        ask(server)
        time.sleep(WRITE_S + BUSY_S)
        server.kill()
    assert counted(tmp_path) == expected
    with serving(tmp_path) as server:
        ask(server)
    assert counted(tmp_path) == expected
    assert {key: one.requests for key, one in expected.items()} == dict(sums) == {"a": 6, "b": 3}


def test_a_kill_under_load_loses_no_more_than_the_stated_bound_and_invents_nothing(tmp_path: Path) -> None:
    done: list[tuple[float, Counts]] = []

    def client(server: ServerProcess, stop: threading.Event) -> None:
        while not stop.is_set():
            with suppress(urllib.error.URLError, http.client.HTTPException, ConnectionError, AssertionError):
                found = chat(server, "a", 2)
                done.append((time.monotonic(), found))

    with serving(tmp_path) as server:
        stop = threading.Event()
        clients = [threading.Thread(target=client, args=(server, stop)) for _ in range(4)]
        for one in clients:
            one.start()
        time.sleep(3.3)
        killed = time.monotonic()
        server.kill()
        stop.set()
        for one in clients:
            one.join()
    found = counted(tmp_path)["a"].tokens
    certain = sum(one.tokens for at, one in done if at < killed - WRITE_S - BUSY_S)
    running = max(one.tokens for _, one in done) * len(clients)  # of which the client never heard
    assert certain <= found <= sum(one.tokens for _, one in done) + running
    assert certain > 0


def test_two_servers_on_one_file_count_together_and_share_a_quota(tmp_path: Path) -> None:
    with serving(tmp_path) as one, serving(tmp_path) as two:
        both = chat(one, "a", 4) + chat(two, "a", 6)
        first = chat(one, "limited", 4)
        assert first.tokens < 60
        deadline = time.monotonic() + 20
        refused = None
        while refused is None and time.monotonic() < deadline:  # the other server hears of it within seconds
            try:
                first += chat(two, "limited", 4)
            except urllib.error.HTTPError as error:
                refused = json.loads(error.read())["error"], error.headers, error.code
    assert refused is not None
    said, headers, status = refused
    assert (status, said["type"], said["code"]) == (429, "insufficient_quota", "insufficient_quota")
    assert "the quota is renewed at" in said["message"]
    now = datetime.now(UTC)
    renewed = datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=UTC)
    assert abs(int(headers["retry-after"]) - (renewed - now).total_seconds()) < 30
    assert counted(tmp_path) == {"a": both, "limited": first}
