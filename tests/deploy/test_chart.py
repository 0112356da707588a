"""The Helm chart, rendered by Helm with every option, held to Kubernetes' schemas and to what the server does."""

from __future__ import annotations

import base64
import json
import subprocess
from copy import deepcopy
from typing import Any

import pytest
import yaml

from service.api import operations
from service.processes import supervisor
from service.server import process as server
from service.settings import PREFIX, load_settings
from tests.deploy.monitoring import DASHBOARD, ROOT, rules

CHART = ROOT / "docker" / "chart"
PYTHON = ROOT / "build" / "chart-venv" / "bin" / "python"

pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="Helm and the schemas are not installed: make chart-test does that"),
    pytest.mark.timeout(600),
]

Object = dict[str, Any]

GPU: dict[str, Any] = yaml.safe_load((CHART / "values-gpu.yaml").read_text())
SECRET = "not-to-be-seen"
MONITORING = {name: {"enabled": True} for name in ("serviceMonitor", "prometheusRule", "dashboard")}

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "gpu": GPU,
    "gpus": {**GPU, "gpus": 4, "frontends": 4},
    "hpa": {"autoscaling": {"type": "hpa"}, **MONITORING},
    "keda": {"autoscaling": {"type": "keda"}, **MONITORING},
    "keys": {
        "apiKeys": {"values": [SECRET, f"sha256:{'0' * 64}"]},
        "metricsKey": {"value": SECRET},
        "hfToken": {"value": SECRET},
        **MONITORING,
    },
    "existing secrets": {
        "apiKeys": {"existingSecret": "ours", "key": "embedding"},
        "metricsKey": {"existingSecret": "ours"},
        "hfToken": {"existingSecret": "hub", "key": "token"},
        "serviceMonitor": {"enabled": True, "interval": "30s", "labels": {"release": "monitoring"}},
    },
    "settings": {
        "settings": {
            "MAX_QUEUED_TOKENS": 2000000,
            "BATCH_SECONDS": 0.5,
            "ANY_MODEL": True,
            "MODEL_ALIASES": {"text-embedding-3-small": ""},
            "QUERY_INSTRUCTION": 'Given a "query":',
        }
    },
    "no volume": {"persistence": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
    "existing volume": {"persistence": {"existingClaim": "models", "accessMode": "ReadWriteMany"}, "replicas": 3},
    "storage class": {"persistence": {"storageClass": "fast"}},
    "closed network": {
        "networkPolicy": {"egressToHub": False, "from": [{"namespaceSelector": {"matchLabels": {"team": "search"}}}]}
    },
    "traces": {
        "networkPolicy": {
            "egressToHub": False,
            "extraEgress": [
                {"to": [{"podSelector": {"matchLabels": {"app": "collector"}}}], "ports": [{"port": 4318}]}
            ],
        }
    },
    "no network policy": {"networkPolicy": {"enabled": False}},
    "placement": {
        "runtimeClassName": "nvidia",
        "priorityClassName": "high",
        "nodeSelector": {"gpu": "h100"},
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {}}
        ],
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "serviceAccount": {"annotations": {"e": "f"}},
        "imagePullSecrets": [{"name": "registry"}],
        "image": {"repository": "registry.example/llm2vec-service", "tag": "1.2.3", "pullPolicy": "Always"},
        "service": {"type": "NodePort", "port": 80},
    },
}

REFUSED: dict[str, dict[str, Any]] = {
    "a name that there is not": {"gpu": 1},
    "one further down": {"persistence": {"sizes": "1Gi"}},
    "a number in words": {"gpus": "one"},
    "less than nothing": {"gpus": -1},
    "no autoscaler of these": {"autoscaling": {"type": "vpa"}},
    "a setting that the chart sets": {"settings": {"PORT": 9000}},
    "a setting by its whole name": {"settings": {"llm2vec.port": 9000}},
    "a hash, which Prometheus can't send": {"metricsKey": {"value": f"sha256:{'0' * 64}"}},
    "a volume that can't be written": {"persistence": {"accessMode": "ReadOnlyMany"}},
    "a size that is none": {"persistence": {"size": "much"}},
}

# What the chart takes as it is given, and Kubernetes does not know.
UNKNOWN: dict[str, dict[str, Any]] = {
    "toleration": {"tolerations": [{"kee": "nvidia.com/gpu"}]},
    "resources": {"resources": {"limit": {"memory": "4Gi"}}},
    "peer": {"networkPolicy": {"from": [{"podSelektor": {}}]}},
}


def ask(values: dict[str, dict[str, Any]], objects: list[Object]) -> Any:
    """What chart.py says of them."""
    asked = json.dumps({"values": values, "objects": objects})
    command = [PYTHON, ROOT / "tests" / "deploy" / "chart.py", CHART]
    done = subprocess.run(command, input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report() -> Any:
    return ask({**CASES, **REFUSED, **UNKNOWN}, [])


def of(report: Any, case: str, kind: str) -> Object:
    """The case's one object of a kind."""
    (found,) = [thing for thing in report["cases"][case]["objects"] if thing["kind"] == kind]
    return dict(found)


def container_of(report: Any, case: str) -> Object:
    """The case's container."""
    (found,) = of(report, case, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(found)


def environment(report: Any, case: str) -> dict[str, str]:
    """The variables that the case's container is given by value."""
    return {one["name"]: one["value"] for one in container_of(report, case)["env"] if "value" in one}


def test_helm_and_kubernetes_have_nothing_against_it(report: Any) -> None:
    assert report["lint"]["errors"] == []
    assert [message for message in report["lint"]["messages"] if message["severity"] > 1] == []
    assert {case: report["cases"][case].get("refused") for case in CASES} == dict.fromkeys(CASES)
    assert {case: report["cases"][case]["problems"] for case in CASES} == {case: [] for case in CASES}


def test_values_that_mean_nothing_are_refused(report: Any) -> None:
    assert [
        case for case in REFUSED if "specifications of the schema" not in report["cases"][case].get("refused", "")
    ] == []


def test_the_schemas_find_what_is_wrong(report: Any) -> None:
    assert [case for case in UNKNOWN if not report["cases"][case]["problems"]] == []
    monitor, rule, scaled = (of(report, "keda", kind) for kind in ("ServiceMonitor", "PrometheusRule", "ScaledObject"))
    wrong = [deepcopy(one) for one in (monitor, monitor, rule, rule, scaled, scaled)]
    wrong[0]["spec"]["endpoints"][0]["relabeling"] = []
    wrong[1]["spec"]["endpoints"][0]["interval"] = 15
    wrong[2]["spec"]["groups"][0]["rules"][0]["labls"] = {}
    del wrong[3]["spec"]["groups"][0]["name"]
    wrong[4]["spec"]["maxReplicas"] = 4
    wrong[5]["spec"]["triggers"] = {}
    found = ask({}, [monitor, rule, scaled, *wrong])["problems"]
    assert [bool(problems) for problems in found] == [False] * 3 + [True] * 6


def test_pods_are_as_the_restricted_security_standard_asks(report: Any) -> None:
    for case in CASES:
        pod, container = of(report, case, "Deployment")["spec"]["template"]["spec"], container_of(report, case)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "persistentVolumeClaim", "secret"}
        assert all("hostPort" not in port for port in container["ports"])
        assert pod["automountServiceAccountToken"] is False
        assert of(report, case, "ServiceAccount")["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False


def test_the_server_takes_its_variables(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in CASES:
        with monkeypatch.context() as variables:
            for name, value in environment(report, case).items():
                variables.setenv(name, value)
            settings = load_settings({})
            devices = {"gpu": "cuda", "gpus": "cuda:all"}
            assert settings.device == devices.get(case, "cpu")
            if case == "settings":
                assert settings.max_queued_tokens == 2_000_000
                assert settings.batch_seconds == 0.5
                assert settings.any_model is True
                assert settings.model_aliases == {"text-embedding-3-small": ""}
                assert settings.query_instruction == 'Given a "query":'


def test_a_pod_has_the_time_that_it_needs_to_end(report: Any) -> None:
    for case in CASES:
        container, variables = container_of(report, case), environment(report, case)
        pod = of(report, case, "Deployment")["spec"]["template"]["spec"]
        several = variables["LLM2VEC_DEVICE"] == "cuda:all" or int(variables["LLM2VEC_FRONTENDS"]) > 1
        after = supervisor._FRONT_END_SECONDS + supervisor._ENGINE_SECONDS if several else server._STOP_SECONDS
        needed = container["lifecycle"]["preStop"]["sleep"]["seconds"] + after
        needed += int(variables["LLM2VEC_SHUTDOWN_GRACE_SECONDS"])
        assert needed < pod["terminationGracePeriodSeconds"] <= needed + 5


def test_probes_ask_what_there_is(report: Any) -> None:
    paths = {getattr(route, "path", "") for route in operations.router.routes}
    for case in CASES:
        container = container_of(report, case)
        probes = {name: container[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
        assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
            "startup": "/readyz",
            "liveness": "/livez",
            "readiness": "/readyz",
        }
        assert {"/readyz", "/livez", "/metrics"} <= paths
        # A probe computes one token where the last batch failed.
        assert probes["readiness"]["timeoutSeconds"] > operations._PROBE_SECONDS
        startup = probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"]
        assert startup == (3600 if case.startswith("gpu") else 1800)
        assert of(report, case, "Deployment")["spec"]["progressDeadlineSeconds"] > startup


def test_a_rollout_never_drops_below_capacity(report: Any) -> None:
    for case in CASES:
        strategy = of(report, case, "Deployment")["spec"]["strategy"]
        assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}


def test_pods_share_a_volume_of_one_node_only_on_that_node(report: Any) -> None:
    for case in CASES:
        deployment = of(report, case, "Deployment")
        claims = [thing for thing in report["cases"][case]["objects"] if thing["kind"] == "PersistentVolumeClaim"]
        together = deployment["spec"]["template"]["spec"].get("affinity", {}).get("podAffinity")
        one_node = any(claim["spec"]["accessModes"] == ["ReadWriteOnce"] for claim in claims)
        assert bool(together) == one_node
        if together:
            (term,) = together["requiredDuringSchedulingIgnoredDuringExecution"]
            assert term["labelSelector"] == deployment["spec"]["selector"]
            assert term["topologyKey"] == "kubernetes.io/hostname"
    assert "nodeAffinity" in of(report, "placement", "Deployment")["spec"]["template"]["spec"]["affinity"]


def test_everything_selects_the_pods(report: Any) -> None:
    for case in CASES:
        objects = {thing["kind"]: thing for thing in report["cases"][case]["objects"]}
        labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
        selector = objects["Deployment"]["spec"]["selector"]["matchLabels"]
        assert selector.items() <= labels.items()
        assert objects["Service"]["spec"]["selector"] == selector
        for kind, where in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
            if kind in objects:
                assert objects[kind]["spec"][where]["matchLabels"] == selector
        if "ServiceMonitor" in objects:
            asked = objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
            assert asked.items() <= objects["Service"]["metadata"]["labels"].items()
            assert (
                objects["ServiceMonitor"]["spec"]["endpoints"][0]["port"]
                == objects["Service"]["spec"]["ports"][0]["name"]
            )


def test_gpus_are_asked_for(report: Any) -> None:
    for case, count in (("default", None), ("gpu", 1), ("gpus", 4)):
        assert container_of(report, case)["resources"]["limits"].get("nvidia.com/gpu") == count


def test_what_scales_alone_decides_how_many_there_are(report: Any) -> None:
    assert of(report, "existing volume", "Deployment")["spec"]["replicas"] == 3
    for case, kind in (("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")):
        deployment, scaler = of(report, case, "Deployment"), of(report, case, kind)
        assert "replicas" not in deployment["spec"]
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert "llm2vec_queue_tokens" in json.dumps(scaler)


def test_secrets_are_in_the_secret_and_nowhere_else(report: Any) -> None:
    assert "Secret" not in {
        thing["kind"] for case in CASES if case != "keys" for thing in report["cases"][case]["objects"]
    }
    secret = of(report, "keys", "Secret")
    data = {name: base64.b64decode(value).decode() for name, value in secret["data"].items()}
    assert data == {"api-keys": f"{SECRET}\nsha256:{'0' * 64}", "metrics-key": SECRET, "hf-token": SECRET}
    others = [thing for thing in report["cases"]["keys"]["objects"] if thing["kind"] != "Secret"]
    assert SECRET not in json.dumps(others)
    for case, name, keys in (
        ("keys", secret["metadata"]["name"], ("api-keys", "metrics-key", "hf-token")),
        ("existing secrets", "ours", ("embedding", "metrics-key", "token")),
    ):
        pod, container = of(report, case, "Deployment")["spec"]["template"]["spec"], container_of(report, case)
        (volume,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "api-keys"]
        assert (volume["secretName"], volume["items"][0]["key"]) == (name, keys[0])
        path = f"{mount['mountPath']}/{volume['items'][0]['path']}"
        assert environment(report, case)[f"{PREFIX}API_KEYS_FILE"] == path
        referred = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container["env"] if "valueFrom" in one}
        metrics = referred[f"{PREFIX}METRICS_KEY"]
        assert (metrics["name"], metrics["key"]) == (name, keys[1])
        assert referred["HF_TOKEN"]["key"] == keys[2]
        endpoint = of(report, case, "ServiceMonitor")["spec"]["endpoints"][0]
        assert endpoint["authorization"]["credentials"] == metrics


def test_the_network_is_as_open_as_it_was_asked_for(report: Any) -> None:
    opened = of(report, "default", "NetworkPolicy")["spec"]
    assert {port["port"] for rule in opened["egress"] for port in rule["ports"]} == {53, 443}
    assert [set(rule) for rule in opened["ingress"]] == [{"ports"}]
    closed = of(report, "closed network", "NetworkPolicy")["spec"]
    assert closed["egress"] == []
    assert closed["ingress"][0]["from"] == [{"namespaceSelector": {"matchLabels": {"team": "search"}}}]
    assert {p["port"] for rule in of(report, "traces", "NetworkPolicy")["spec"]["egress"] for p in rule["ports"]} == {
        53,
        4318,
    }


def test_alerts_and_dashboard_are_those_of_compose(report: Any) -> None:
    groups = of(report, "hpa", "PrometheusRule")["spec"]["groups"]
    assert [rule for group in groups for rule in group["rules"]] == rules()
    assert of(report, "hpa", "ConfigMap")["data"]["llm2vec.json"] == DASHBOARD.read_text()
    (relabeling,) = of(report, "hpa", "ServiceMonitor")["spec"]["endpoints"][0]["relabelings"]
    assert relabeling == {"targetLabel": "job", "replacement": "llm2vec"}
