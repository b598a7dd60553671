"""The rendered chart's server, run: its own command and environment, its `helm test`, its metrics.

There is no cluster here, so `pods.py` starts the containers' commands as processes; test_nodes.py has two nodes.
"""

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripts.demo import MODEL
from tests.e2e.conftest import Demo
from tests.e2e.pods import QUICK_START, helm_test, running
from tests.e2e.streams import LONG, STREAMS, Stream, open_streams
from tests.helm.chart import render, templates
from tests.helm.expressions import ASKED_FOR, ELSEWHERE, hpa_metrics, named_metrics, recorded_series

from lowbit_core.server_process import free_port

pytestmark = pytest.mark.engine

TOKENS = 300  # of each stream
REQUESTS = 8  # of helm test
DRAIN_S = 600  # a slow machine's streams; they take 20 s on a quiet one


def scraped(url: str) -> set[str]:
    """The names of all samples of a scrape."""
    page = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    return set(re.findall(r"^([A-Za-z_:][\w:]*)[{ ]", page, re.MULTILINE))


def test_every_metric_of_rules_dashboard_and_scaling_exists_in_a_scrape(server: str) -> None:
    question: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert httpx.post(f"{server}/v1/chat/completions", json=question, timeout=60).status_code == 200
    refused = httpx.post(
        f"{server}/v1/chat/completions", content="{", timeout=60
    )  # for the counter of rejections
    assert refused.status_code in (400, 415)
    exist = scraped(server)
    assert named_metrics() - exist - recorded_series() - ASKED_FOR == ELSEWHERE
    assert {name.replace("vllm_", "vllm:", 1) for name in hpa_metrics()} <= exist


def test_a_rendered_pod_starts_in_its_budget_answers_helm_test_and_loses_no_stream_at_sigterm(
    demo: Demo, tmp_path: Path
) -> None:
    shutdown = {"terminationGracePeriodS": DRAIN_S + 60}
    server = QUICK_START | {"drainTimeoutS": DRAIN_S}
    resources = render("cpu", server=server, shutdown=shutdown, test={"requests": REQUESTS})
    (template,) = templates(resources)
    with running(resources, template, demo.checkpoint, free_port(), tmp_path / "pod") as pod:
        began = time.monotonic()
        assert pod.wait_until_started() <= {0, 503}
        started_s = time.monotonic() - began
        assert (pod.probe("readiness"), pod.probe("liveness")) == (200, 200)
        (tmp_path / "test").mkdir()
        result = json.loads(helm_test(resources, pod, tmp_path / "test").strip().splitlines()[-1])
        assert result["outcomes"]["completed"] == result["requests"] == REQUESTS
        story = LONG | {"max_tokens": TOKENS}
        streams = open_streams(lambda: Stream(pod.url, "none", story), STREAMS)
        pod.terminate()
        assert all(stream.ended_at is None for stream in streams)
        ended_s = pod.wait_until_ended(pod.grace_s)
        for stream in streams:
            *answer, usage, done = stream.join()
            assert (stream.failure, done) == (None, "[DONE]")
            assert json.loads(answer[-1])["choices"][0]["finish_reason"] == "length"
            assert json.loads(usage)["usage"]["completion_tokens"] == TOKENS
    print(
        f"ready after {started_s:.1f} of {pod.budget_s:.0f} s, ended after {ended_s:.1f} of {pod.grace_s:.0f} s"
    )
