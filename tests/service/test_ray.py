"""On Ray, where it is installed: the same vectors from Ray Data; replicas of Ray Serve, killed and healed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pyarrow import dataset

from service.ray.scaling import QueuedTokens
from service.settings import load_settings
from tests.service.bulk.output import read_output
from tests.tiny import build_tiny

pytest.importorskip("ray", reason="Ray is in the extra `ray`")

ROOT = Path(__file__).parents[2]

# Ray, its workers and their imports of torch, on a machine of few cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "tiny"
    build_tiny(folder, "gemma3_text")
    return folder


def run(*arguments: object, **environment: str) -> str:
    """What a command of this repository prints."""
    ran = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**clean_environment(), "LLM2VEC_COMPILE": "off", "LLM2VEC_DTYPE": "float32", **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    return ran.stdout


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("LLM2VEC_")}


def test_ray_data_gives_the_vectors_of_embed(tmp_path: Path, encoder: Path) -> None:
    texts = [f"{number}: a text of its own" for number in range(300)]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, some in zip(paths, (texts[:120], [*texts[120:], "too long " * 600]), strict=True):
        path.write_text("".join(json.dumps({"text": text, "n": len(text)}) + "\n" for text in some))
    options = ["--model", encoder, "--on-error", "skip"]
    run("-m", "service", "embed", *paths, "--out", tmp_path / "here", *options)
    run("examples/ray_data_embed.py", *paths, "--out", tmp_path / "there", "--rows-at-once", 50, *options)
    here = read_output(tmp_path / "here")
    there: list[dict[str, Any]] = dataset.dataset(tmp_path / "there").to_table().to_pylist()
    by_text = {row["text"]: row for row in there}
    assert len(there) == len(by_text) == 301
    found = np.array([by_text[text]["embedding"] for text in texts], np.float32)
    np.testing.assert_allclose(found, here.vectors, atol=2e-5)
    assert by_text[texts[7]]["n"] == len(texts[7])
    bad = by_text["too long " * 600]
    assert bad["embedding"] is None
    assert bad["error"] == here.errors[0]["reason"]
    assert {row["error"] for row in there if row["text"] in texts} == {None}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_replica_that_is_killed_under_load_loses_no_request(tmp_path: Path, encoder: Path) -> None:
    options = ["--model", encoder, "--requests", 150, "--only", "killed", "--out", tmp_path / "figures.json"]
    run("-m", "tests.service.ray_replicas", *options)
    found = json.loads((tmp_path / "figures.json").read_text())["killed"]
    assert found["undisturbed"]["answers"] == {"200": 150}
    assert found["counted"]["attempts"]["200"] == 150
    assert found["counted"]["lost"] == found["counted"]["wrong"] == 0
    assert found["openai"]["answered"] == 150
    assert found["openai"]["failed"] == found["openai"]["wrong"] == 0


def test_the_configuration_is_one_that_ray_takes() -> None:
    document = yaml.safe_load((ROOT / "docker" / "ray" / "serve.yaml").read_text())
    (application,) = document["applications"]
    load_settings(application["args"])
    (deployment,) = application["deployments"]
    policy = deployment["autoscaling_config"]["policy"]
    assert policy["policy_function"] == f"{QueuedTokens.__module__}:{QueuedTokens.__name__}"
    QueuedTokens(**policy["policy_kwargs"])
    checks = "import json, sys, ray.serve.schema as s; s.ServeDeploySchema.model_validate(json.loads(sys.argv[1]))"
    run("-c", checks, json.dumps(document))


def test_a_replica_tells_what_waits_and_how_busy_its_device_is() -> None:
    lines = """
import types
from service.metrics import Metrics
from service.ray.ray_serve import Replica
metrics, replica = Metrics(), Replica()
batcher = types.SimpleNamespace(queued_tokens=700)
backend = types.SimpleNamespace(batcher=batcher)
parts = types.SimpleNamespace(metrics=metrics, backend=backend)
replica.app = types.SimpleNamespace(state=types.SimpleNamespace(parts=parts))
before = replica.record_autoscaling_stats()
metrics.device_seconds.labels("cpu").inc(1000)
print(before, replica.record_autoscaling_stats(), replica.record_autoscaling_stats())
"""
    idle, busy = {"queued_tokens": 700.0, "busy": 0.0}, {"queued_tokens": 700.0, "busy": 1.0}
    assert run("-c", lines).strip() == f"{idle} {busy} {idle}"
