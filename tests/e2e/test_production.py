"""Counts, quotas and the shadow on the real engine; the served checkpoint's base is itself, in another server.

benchmarks/shadow has a quantized model against its real base, and `lowbit evaluate` beside it.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import OpenAI, RateLimitError
from prometheus_client.parser import text_string_to_metric_families
from scripts.demo import KV_CACHE_GIB, LOWBIT, MODEL
from tests.e2e.conftest import Demo
from tests.e2e.streams import until

from lowbit_core.server_process import free_port, start_server
from lowbit_server.cost.usage_file import Counts, read_rows, reading
from lowbit_server.gateway.keys import digest, new_key
from lowbit_server.shadow.worker import OUTCOMES

pytestmark = pytest.mark.engine

QUOTA = 900
SCORED_S = 240.0  # two engines on a small machine
REST_S = 10.0  # longer than one answer is scored for
LONG = "Read this list of words and say which is the longest: " + "sea bridge piano lantern " * 40


@dataclass(frozen=True)
class Watched:
    """A server with everything that is watched in production on."""

    url: str
    usage: Path
    user: str
    limited: str
    admin: str
    log: Path

    def client(self, key: str) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def metrics(self) -> dict[str, float]:
        """Lowbit's samples by name and the values of labels but the model's."""
        page = httpx.get(
            f"{self.url}/metrics", headers={"authorization": f"Bearer {self.admin}"}, timeout=60
        ).text
        return {
            " ".join(
                [sample.name, *(value for name, value in sample.labels.items() if name != "model")]
            ): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name.startswith("lowbit_")
        }


@pytest.fixture(scope="module")
def watched(demo: Demo, server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """`server` is the base: the same checkpoint, so that nothing but rounding lies between them."""
    folder = tmp_path_factory.mktemp("watched")
    keys = {name: new_key() for name in ("user", "limited", "admin")}
    more: dict[str, dict[str, Any]] = {
        "limited": {"tokens_per_month": QUOTA},
        "admin": {"admin": True},
        "user": {},
    }
    entries = [{"name": name, "sha256": digest(key), **more[name]} for name, key in keys.items()]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}))
    port = free_port()
    command = [
        *LOWBIT, "serve", str(demo.checkpoint), "--port", str(port), "--served-model-name", MODEL, "--enforce-eager",
        "--kv-cache-gib", KV_CACHE_GIB, "--api-keys", str(folder / "keys.yaml"), "--usage-file", str(folder / "u.db"),
        "--price-per-hour", "3.6", "--shadow", server, "--shadow-share", "1",
    ]  # fmt: skip
    log = folder / "serve.log"
    process = start_server(command, f"http://127.0.0.1:{port}", log, name="lowbit serve")
    try:
        process.wait_until_ready()
        yield Watched(process.url, folder / "u.db", **keys, log=log)
        assert process.stop() == 0
    finally:
        process.kill()


def used(answer: Any) -> Counts:
    usage = answer.usage
    return Counts(1, usage.prompt_tokens, usage.completion_tokens)


def written(watched: Watched) -> dict[str, Counts]:
    with reading(watched.usage) as connection:
        return {key: counts for (_, key), counts in read_rows(connection).items()}


def test_tokens_are_counted_as_the_client_sees_them_cached_ones_too(watched: Watched) -> None:
    client = watched.client(watched.user)
    question: Any = {"model": MODEL, "messages": [{"role": "user", "content": LONG}], "max_tokens": 6}
    first = used(client.chat.completions.create(**question))
    again = used(client.chat.completions.create(**question))
    until(lambda: written(watched).get("user", Counts()).requests == 2, 10)
    counts = written(watched)["user"]
    both = first + again
    assert (counts.prompt, counts.completion) == (both.prompt, both.completion)
    assert 0 < counts.cached < again.prompt
    found = watched.metrics()
    assert found["lowbit_key_cached_tokens_total user"] == counts.cached
    assert found["lowbit_gateway_overhead_seconds_count"] == 2
    assert 0 < found["lowbit_gateway_overhead_seconds_sum"] < 1
    assert math.isfinite(found["lowbit_cost_per_million_tokens generated"])


def test_a_key_whose_month_is_used_up_is_told_so_in_openais_words(watched: Watched) -> None:
    client = watched.client(watched.limited)
    question: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 300}
    total, refused = Counts(), None
    while refused is None and total.tokens <= QUOTA:
        try:
            total += used(client.chat.completions.create(**question, extra_body={"ignore_eos": True}))
        except RateLimitError as error:
            refused = error
    assert refused is not None
    assert 0 < total.tokens <= QUOTA
    assert (refused.code, refused.type) == ("insufficient_quota", "insufficient_quota")
    assert int(refused.response.headers["retry-after"]) > 0
    assert watched.metrics()["lowbit_key_month_tokens limited"] == total.tokens


def test_answers_are_scored_again_and_the_same_model_is_near_itself(watched: Watched) -> None:
    """Chats and completions, streamed and whole; not those with several choices."""
    client = watched.client(watched.user)

    def outcomes() -> dict[str, float]:
        found = watched.metrics()
        return {name: found[f"lowbit_shadow_answers_total {name}"] for name in OUTCOMES}

    def scored_tokens() -> float:
        return watched.metrics()["lowbit_shadow_tokens_total"]

    def at_rest() -> bool:
        """Nothing waits, and nothing is being scored: the sum stands still."""
        before = scored_tokens()
        time.sleep(REST_S)
        return watched.metrics()["lowbit_shadow_waiting"] == 0 and scored_tokens() == before

    until(at_rest, SCORED_S)
    before, tokens = outcomes(), scored_tokens()
    question: Any = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Name three seas."}],
        "max_tokens": 12,
    }
    generated = used(client.chat.completions.create(**question)).completion
    assert len(list(client.chat.completions.create(**question | {"max_tokens": 9}, stream=True))) > 1
    text: Any = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 7, "temperature": 1.0}
    generated += used(client.completions.create(**text)).completion
    client.chat.completions.create(**question, n=2, temperature=1.0)
    until(lambda: outcomes()["scored"] == before["scored"] + 3, SCORED_S)
    found = watched.metrics()
    assert generated < found["lowbit_shadow_tokens_total"] - tokens <= generated + 9
    assert found["lowbit_shadow_kld"] < 0.02
    assert found["lowbit_shadow_kld_stderr"] < 0.02
    assert 0 < found["lowbit_shadow_remainder"] < 0.9
    assert {name for name, count in outcomes().items() if count} == {"scored"}


def test_the_log_and_the_usage_file_hold_nothing_of_what_was_said(watched: Watched) -> None:
    text = watched.log.read_text() + watched.usage.read_bytes().decode("latin-1")
    assert "lantern" not in text
    assert "Name three seas" not in text
    lines = [json.loads(line) for line in watched.log.read_text().splitlines() if line.startswith('{"time"')]
    assert any(line["cached_tokens"] for line in lines)
