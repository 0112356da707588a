"""The GPU benchmark on tiny shapes: it runs through, and says what it left out. The GPU tests can be collected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_stand_in import environment

ROOT = Path(__file__).parents[2]

WITHOUT_PYDANTIC = "import sys; sys.modules['pydantic'] = None; "


def python(*arguments: str, gpus: int = 0) -> str:
    """What it prints, with so many stand-in GPUs."""
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment(gpus) if gpus else {"PYTHONPATH": str(ROOT)})},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def test_forward_passes_need_no_pydantic() -> None:
    assert "--shapes" in python("-c", WITHOUT_PYDANTIC + "from bench.gpu.__main__ import main; main()", "--help")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_step_on_a_stand_in_gpu(tmp_path: Path) -> None:
    command = ["--shapes", "tiny", "--device", "cuda", "--commit", "abc", "--out", str(tmp_path)]
    found: dict[str, Any] = json.loads(python("-m", "bench.gpu", *command, gpus=1).splitlines()[-1])
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    assert found["machine"]["commit"] == "abc"
    assert found["skipped"] == found["errors"] == {}
    figures = found["figures"]
    eager = figures["1.3B eager"]["16"]
    assert eager.keys() == {"device_ms", "wall_ms", "host_ms", "tokens_per_second", "of_ceiling"}
    assert found["targets"]["8B lone query, of the time to read the weights"]["value"] > 0
    assert any("aten::" in line for line in figures["8B kernels at 16"])
    assert figures["8B by tokens"]["16"].keys() == {"plain", "graph"}
    assert "8B at 64, of the matmul rate" in found["targets"]
    served = figures["1.3B over HTTP"]
    assert served["queries × 16 beside bulk"]["p99_ms"] > 0
    assert found["targets"]["1.3B, HTTP / engine rate"]["value"] == pytest.approx(served["http / engine"], rel=0.01)


def test_the_tests_for_a_gpu_need_neither_plugins_nor_pydantic() -> None:
    no_plugins = "import os; os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'; "
    code = WITHOUT_PYDANTIC + no_plugins + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    printed = python("-c", code, "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu", "--collect-only", "-q")
    assert "test_captured_graphs_equal_the_plain_way" in printed
