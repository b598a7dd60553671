"""The PromQL of the rendered chart: rules, dashboard panels and scaling queries, and the metrics that they name."""

import json
from collections.abc import Iterator
from typing import Any

from promql_parser import parse
from tests.helm.chart import Resource, render

# Prometheus' own, and the one fact that a server which is ending cannot tell about itself.
ELSEWHERE = {"up", "kube_pod_deletion_timestamp"}
# On a scrape only where it was asked for, or where the machine can be read; tests/server/test_app.py has each of them.
ASKED_FOR = {
    "lowbit_cost_per_million_tokens", "lowbit_energy_joules_total", "lowbit_key_month_quota_tokens",
    "lowbit_key_month_tokens", "lowbit_shadow_answers_total", "lowbit_shadow_nats_total", "lowbit_shadow_tokens_total",
    "lowbit_usage_write_failures_total",
}  # fmt: skip
HPA: Resource = {"autoscaling": {"mode": "hpa"}}


def rules(**changes: Any) -> list[Resource]:
    """Recording and alert rules."""
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


def every_expression() -> list[str]:
    return [*(rule["expr"] for rule in rules()), *panel_expressions(), *keda_queries()]


def recorded_series() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def hpa_metrics() -> set[str]:
    """As the metrics adapter offers them."""
    metrics = render("autoscaled", **HPA)["HorizontalPodAutoscaler"]["spec"]["metrics"]
    return {metric["pods"]["metric"]["name"] for metric in metrics}


def named_metrics() -> set[str]:
    """What rules, dashboard and KEDA read."""
    return {name for expression in every_expression() for name in names(parse(expression))}


def names(node: Any) -> Iterator[str]:
    """The metrics that an expression reads."""
    if (name := getattr(node, "name", None)) and type(node).__name__ == "VectorSelector":
        yield name
    for child in ("expr", "lhs", "rhs", "vector_selector", "param"):
        if (below := getattr(node, child, None)) is not None and not isinstance(below, str | float):
            yield from names(below)
    for argument in getattr(node, "args", None) or []:
        yield from names(argument)
