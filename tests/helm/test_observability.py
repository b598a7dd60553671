"""Rules, dashboard and scaling queries: every expression parses; alerts, their runbook and their unit tests agree.

tests/e2e/test_pod.py holds every metric in them against a scrape of the running server.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from promql_parser import parse
from tests.helm.chart import ROOT, render
from tests.helm.expressions import dashboard, hpa_metrics, named_metrics, names, recorded_series, rules

HERE = Path(__file__).parent
PROMTOOL = shutil.which("promtool") or shutil.which("promtool", path=str(Path(sys.executable).parent))


def test_names_are_found_in_every_part_of_an_expression() -> None:
    text = (
        'sum by (a) (rate(vllm:x_total[5m])) / on (a) b > 2 and histogram_quantile(0.9, (c{d="e"})) unless -f'
    )
    assert set(names(parse(text))) == {"vllm:x_total", "b", "c", "f"}


def test_every_metric_of_ours_is_documented() -> None:
    documented = set(
        re.findall(r"^\| `(lowbit_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    )
    named = {name.removesuffix("_bucket") for name in named_metrics() if name.startswith("lowbit_")}
    assert named <= documented


def test_hpa_names_metrics_as_the_documented_adapter_rule_offers_them() -> None:
    deploy = (ROOT / "docs" / "deploy.md").read_text()
    (pattern,) = re.findall(r"__name__=~\"(vllm:[^\"]+)\"", deploy)
    assert 'name: {matches: "vllm:(.*)", as: "vllm_${1}"}' in deploy
    assert all(re.fullmatch(pattern, name.replace("vllm_", "vllm:", 1)) for name in hpa_metrics())


def test_every_recorded_series_is_used_or_documented() -> None:
    deploy = (ROOT / "docs" / "deploy.md").read_text()
    assert {name for name in recorded_series() - named_metrics() if f"`{name}`" not in deploy} == set()


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


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed; scripts/prometheus fetches it")
def test_promtool_checks_and_unit_tests_the_rules(tmp_path: Path) -> None:
    spec = render("autoscaled")["PrometheusRule"]["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "rules_test.yaml").write_text((HERE / "rules_test.yaml").read_text())
    for command in (
        ["check", "rules", "--lint=all", "--lint-fatal", "rules.yaml"],
        ["test", "rules", "rules_test.yaml"],
    ):
        done = subprocess.run(
            [str(PROMTOOL), *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_unit_tested_both_ways() -> None:
    cases = yaml.safe_load((HERE / "rules_test.yaml").read_text())["tests"]
    tests = [test for case in cases for test in case.get("alert_rule_test", [])]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {test["alertname"] for test in tests if test.get("exp_alerts")} == alerts
    assert {test["alertname"] for test in tests if not test.get("exp_alerts")} == alerts
