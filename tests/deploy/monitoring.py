"""The dashboard's queries, the alerts, and a real Prometheus that has the project's configuration."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker" / "prometheus"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "llm2vec.json"

# A test that skips without these says how to get them.
NO_PROMETHEUS = "no prometheus and promtool: `make programs` installs both"


def dashboard() -> dict[str, Any]:
    """The dashboard as it is in its file."""
    content: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return content


def rules() -> list[dict[str, Any]]:
    """The alerts as they are in their file."""
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@dataclass(frozen=True)
class Query:
    """One query of a panel, with the dashboard's variables still in it."""

    panel: str
    expr: str
    instant: bool
    needs_gpu: bool


def queries() -> list[Query]:
    """Every query of the dashboard. A panel that has something to show only on a GPU says so."""
    return [
        Query(panel["title"], target["expr"], target["instant"], "Only where there is a GPU." in panel["description"])
        for panel in dashboard()["panels"]
        if panel["type"] != "row"
        for target in panel["targets"]
    ]


class Prometheus:
    """A Prometheus that runs docker/prometheus/prometheus.yml, but oftener."""

    def __init__(self, folder: Path, target: str, key: str) -> None:
        """`target` is host:port of what is scraped in the server's place, `key` what its metrics need."""
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "3s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "metrics_key").write_text(key)
        shutil.copy(PROMETHEUS / "alerts.yml", folder)
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._api = httpx.Client(base_url=f"http://{address}", timeout=30)
        options = {
            "config.file": "prometheus.yml",
            "storage.tsdb.path": "data",
            "web.listen-address": address,
            "log.level": "warn",
        }
        command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(command, cwd=folder, stdout=self._log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._api.close()
        self._log.close()

    def get(self, path: str, **parameters: Any) -> Any:
        """What the HTTP API has under `data`."""
        answer = self._api.get(f"/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        return answer.json()["data"]

    def values(self, query: str, instant: bool, seconds: float = 30.0) -> dict[str, list[float]]:
        """Each series' numbers now, or over so many seconds until now; those that are none are left out."""
        now = time.time()
        if instant:
            result = self.get("query", query=query, time=now)["result"]
        else:
            result = self.get("query_range", query=query, start=now - seconds, end=now, step=1)["result"]
        found = {}
        for series in result:
            samples = [float(value) for _, value in series.get("values", [series.get("value")])]
            found[json.dumps(series["metric"], sort_keys=True)] = [one for one in samples if math.isfinite(one)]
        return found

    def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"}

    def until(self, what: str, seconds: float = 90.0) -> None:
        """Wait until this query has a result."""
        end = time.monotonic() + seconds
        while not self._has(what):
            assert self._process.poll() is None, "Prometheus ended: see its log"
            assert time.monotonic() < end, f"{what} had no result"
            time.sleep(0.2)

    def _has(self, query: str) -> bool:
        try:
            answer = self._api.get("/api/v1/query", params={"query": query})
        except httpx.TransportError:  # it does not listen yet
            return False
        return answer.status_code == 200 and bool(answer.json()["data"]["result"])


def with_values(expr: str, variables: dict[str, str]) -> str:
    """A query with the dashboard's variables filled in, as Grafana would.

    Raises:
        AssertionError: if one is left that has no value.
    """
    for name, value in variables.items():
        expr = expr.replace(f"${name}", value)
    assert "$" not in expr, expr
    return expr
