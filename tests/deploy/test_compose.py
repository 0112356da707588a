"""The compose files: that they fit each other, the server and what is mounted; no container is started here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import yaml

from service.processes import supervisor
from service.server import process as server
from service.settings import PREFIX, Settings
from tests.deploy.monitoring import PROMETHEUS, ROOT, dashboard

BASE = "docker-compose.yml"
OVERRIDES = ("docker/compose.cpu.yml", "docker/compose.gpus.yml", "docker/compose.flash-attn.yml")
MONITORING = ("prometheus", "grafana")


class _Loader(yaml.SafeLoader):
    """YAML with Compose's tags."""


_Loader.add_constructor("!reset", lambda loader, node: None)


def load(file: str) -> Any:
    """A compose file's services, as they are in it."""
    return yaml.load((ROOT / file).read_text(), _Loader)["services"]


def seconds(duration: str) -> float:
    """Of a duration in whole seconds."""
    return float(duration.removesuffix("s"))


def test_the_servers_variables_are_settings() -> None:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {"HF_TOKEN"}
    for file in (BASE, *OVERRIDES):
        assert set(load(file)["llm2vec"].get("environment", {})) <= known


def test_the_server_has_the_time_that_it_needs_to_end() -> None:
    grace = Settings.model_fields["shutdown_grace_seconds"].default
    one = seconds(load(BASE)["llm2vec"]["stop_grace_period"])
    several = seconds(load("docker/compose.gpus.yml")["llm2vec"]["stop_grace_period"])
    assert one > grace + server._STOP_SECONDS
    assert several > grace + supervisor._FRONT_END_SECONDS + supervisor._ENGINE_SECONDS


def test_monitoring_comes_only_when_asked_for_and_opens_nothing() -> None:
    services = load(BASE)
    assert {name for name, service in services.items() if "profiles" not in service} == {"llm2vec"}
    for name in MONITORING:
        service = services[name]
        assert service["profiles"] == ["monitoring"]
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "a version of its own"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        for volume in service["volumes"]:
            assert volume.endswith(":ro") or volume == "prometheus:/prometheus"
    environment = services["grafana"]["environment"]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_what_is_mounted_is_there() -> None:
    for name in MONITORING:
        for volume in load(BASE)[name]["volumes"]:
            source = re.sub(r"^\$\{\w+:-(.*?)\}", r"\1", volume).partition(":")[0]
            assert not source.startswith(".") or (ROOT / source).exists()
    assert (PROMETHEUS / "no_key").read_text() == ""


def test_prometheus_and_grafana_find_what_they_look_for() -> None:
    services = load(BASE)
    (scrape,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"llm2vec:{services['llm2vec']['environment']['LLM2VEC_PORT']}"]}]
    grafana = ROOT / "docker" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((grafana / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    chosen = dashboard()["templating"]["list"][0]
    assert (chosen["name"], chosen["type"], chosen["current"]["value"]) == ("datasource", "datasource", source["uid"])
    (provider,) = yaml.safe_load((grafana / "dashboards" / "llm2vec.yml").read_text())["providers"]
    folder = provider["options"]["path"]
    assert f"./docker/grafana/dashboards:{folder}:ro" in services["grafana"]["volumes"]
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/llm2vec.json"


@pytest.mark.skipif(shutil.which("podman") is None, reason="podman-compose asks podman: `make programs` installs it")
def test_each_override_changes_what_it_says() -> None:
    def together(*files: str) -> Any:
        options = [option for file in (BASE, *files) for option in ("-f", file)]
        command = [sys.executable, "-m", "podman_compose", *options, "--profile", "monitoring", "config"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        services = yaml.safe_load(done.stdout)["services"]
        assert set(services) == {"llm2vec", *MONITORING}
        return services["llm2vec"]

    cpu, gpus, flash = OVERRIDES
    alone = together()
    assert alone["environment"]["LLM2VEC_DEVICE"] == "cuda"
    assert alone["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 1
    assert together(cpu)["environment"]["LLM2VEC_DEVICE"] == "cpu"
    assert "deploy" not in together(cpu)
    assert together(gpus)["environment"]["LLM2VEC_DEVICE"] == "cuda:all"
    assert together(gpus)["gpus"] == "all"
    assert "deploy" not in together(gpus)
    assert together(flash)["build"]["target"] == "server-flash"
    both = together(gpus, flash)
    assert (both["build"]["target"], both["environment"]["LLM2VEC_DEVICE"]) == ("server-flash", "cuda:all")
