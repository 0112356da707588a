"""The alerts: promtool runs their unit tests, and each is explained."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.deploy.monitoring import NO_PROMETHEUS, PROMETHEUS, ROOT, dashboard, rules


def promtool(*arguments: str) -> str:
    """What promtool says, if it is content."""
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("promtool") is None, reason=NO_PROMETHEUS)
def test_each_alert_fires_when_it_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts.test.yml")
    assert "SUCCESS" in promtool("check", "config", "--syntax-only", "prometheus.yml")


def test_each_alert_is_tested_and_says_what_to_do() -> None:
    tested = set(re.findall(r"alertname: (\w+)", (PROMETHEUS / "alerts.test.yml").read_text()))
    anchors = [
        line[3:].lower() for line in (ROOT / "docs/alerts.md").read_text().splitlines() if line.startswith("## ")
    ]
    assert tested == {rule["alert"] for rule in rules()}
    assert anchors == [rule["alert"].lower() for rule in rules()]
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"docs/alerts.md#{rule['alert'].lower()}"
        assert {"summary", "description"} < set(rule["annotations"])
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_the_panels_that_the_advice_names_are_there() -> None:
    named = set(re.findall(r"\*([^*]+)\*", (ROOT / "docs/alerts.md").read_text().replace("\n", " ")))
    panels = {panel["title"] for panel in dashboard()["panels"]}
    legends = {target["legendFormat"] for panel in dashboard()["panels"] for target in panel.get("targets", [])}
    assert named - panels - legends == {"Targets"}, "Targets is a page of Prometheus"
