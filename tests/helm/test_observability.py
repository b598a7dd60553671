"""Rules, dashboard and scaling queries: every expression parses, and names only metrics that the server has.

vllm_metrics.txt is vLLM's part of a scrape of `lowbit serve` (vLLM 0.32.0, CPU, after a few requests); our own part
is docs/metrics.md, which tests/server holds against the running app.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from promql_parser import parse
from tests.helm.chart import ROOT, Resource, render

HERE = Path(__file__).parent
VLLM = set((HERE / "vllm_metrics.txt").read_text().split())
OURS = set(re.findall(r"^\| `(lowbit_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
# Prometheus' own, and the one fact that a server which is ending cannot tell about itself.
ELSEWHERE = {"up", "kube_pod_deletion_timestamp"}
HPA: Resource = {"autoscaling": {"mode": "hpa"}}


def rules(**changes: Any) -> list[Resource]:
    spec = render("autoscaled", **changes)["PrometheusRule"]["spec"]
    return [rule for group in spec["groups"] for rule in group["rules"]]


def dashboard() -> Resource:
    loaded: Resource = json.loads(render("autoscaled")["Dashboard"]["data"]["lowbit.json"])
    return loaded


def panel_expressions() -> list[str]:
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    return [expression.replace("$__rate_interval", "5m") for expression in found]


def keda_queries() -> list[str]:
    triggers = render("autoscaled")["ScaledObject"]["spec"]["triggers"]
    return [trigger["metadata"]["query"] for trigger in triggers]


def names(node: Any) -> Iterator[str]:
    """The metrics that an expression reads."""
    if (name := getattr(node, "name", None)) and type(node).__name__ == "VectorSelector":
        yield name
    for child in ("expr", "lhs", "rhs", "vector_selector", "param"):
        if (below := getattr(node, child, None)) is not None and not isinstance(below, str | float):
            yield from names(below)
    for argument in getattr(node, "args", None) or []:
        yield from names(argument)


def every_expression() -> list[str]:
    return [*(rule["expr"] for rule in rules()), *panel_expressions(), *keda_queries()]


def test_names_are_found_in_every_part_of_an_expression() -> None:
    text = (
        'sum by (a) (rate(vllm:x_total[5m])) / on (a) b > 2 and histogram_quantile(0.9, (c{d="e"})) unless -f'
    )
    assert set(names(parse(text))) == {"vllm:x_total", "b", "c", "f"}


def test_every_metric_of_rules_dashboard_and_scaling_exists_in_a_scrape() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for expression in every_expression() for name in names(parse(expression))}
    assert used - VLLM - OURS - recorded == ELSEWHERE
    assert len(used & (VLLM | OURS)) > 20


def test_hpa_names_metrics_of_the_scrape_as_the_adapter_offers_them() -> None:
    metrics = render("autoscaled", **HPA)["HorizontalPodAutoscaler"]["spec"]["metrics"]
    offered = {metric["pods"]["metric"]["name"] for metric in metrics}
    assert offered == {"vllm_num_requests_waiting", "vllm_kv_cache_usage_perc"}
    assert {name.replace("vllm_", "vllm:", 1) for name in offered} <= VLLM


def test_every_recorded_series_is_used_or_documented() -> None:
    used = {name for expression in every_expression() for name in names(parse(expression))}
    deploy = (ROOT / "docs" / "deploy.md").read_text()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert {name for name in recorded - used if f"`{name}`" not in deploy} == set()


def test_every_alert_has_its_section_in_the_runbook_and_no_section_is_left_over() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    sections = set(re.findall(r"^## (Lowbit\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE))
    assert sections == {rule["alert"] for rule in alerts}
    for rule in alerts:
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_rules_follow_the_values() -> None:
    changes = {"monitoring": {"prometheusRule": {"availability": 0.999, "timeToFirstTokenS": 1}}}
    text = json.dumps(rules(**changes, startup={"budgetS": 700}, autoscaling={"queuePerReplica": 5}))
    assert 'le=\\"1.0\\"' in text
    assert "14.4 * (1 - 0.999)" in text
    assert "700s" in text
    assert "> 5 * count" in text
    assert not re.search(r"RELEASE|RUNBOOK|STARTUP|AVAILABILITY|TTFT|QUEUE|PODS", text)


def test_a_release_that_may_scale_to_zero_is_not_missed() -> None:
    keda = {"triggers": [{"type": "cron", "metadata": {}}]}
    (missing,) = [rule for rule in rules() if rule.get("alert") == "LowbitNoReplica"]
    (allowed,) = [
        rule
        for rule in rules(autoscaling={"minReplicas": 0, "keda": keda})
        if rule.get("alert") == "LowbitNoReplica"
    ]
    assert "absent" in missing["expr"]
    assert "absent" not in allowed["expr"]


def test_panels_have_titles_and_units_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_checks_and_unit_tests_the_rules(tmp_path: Path) -> None:
    spec = render("autoscaled")["PrometheusRule"]["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "rules_test.yaml").write_text((HERE / "rules_test.yaml").read_text())
    for command in (
        ["check", "rules", "--lint=all", "--lint-fatal", "rules.yaml"],
        ["test", "rules", "rules_test.yaml"],
    ):
        done = subprocess.run(
            ["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_unit_tested_both_ways() -> None:
    cases = yaml.safe_load((HERE / "rules_test.yaml").read_text())["tests"]
    tests = [test for case in cases for test in case.get("alert_rule_test", [])]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {test["alertname"] for test in tests if test.get("exp_alerts")} == alerts
    assert {test["alertname"] for test in tests if not test.get("exp_alerts")} == alerts
