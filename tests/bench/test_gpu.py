"""The GPU benchmark on tiny shapes: it runs through, and says what it left out. The GPU tests can be collected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cpus import SAME_BITS
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


def benchmark(folder: Path, *command: str, device: str = "cpu") -> dict[str, Any]:
    """Its figures, which must be the same in the file and in the last line."""
    gpus = int(device == "cuda")
    printed = python(*command, "--shapes", "tiny", "--device", device, "--out", str(folder), gpus=gpus)
    document: dict[str, Any] = json.loads(printed.splitlines()[-1])
    assert json.loads((folder / "gpu.json").read_text()) == document
    assert document["errors"] == {}
    assert document["checks"]
    assert all(check["ok"] for check in document["checks"].values())
    return document


@pytest.mark.timeout(400)
def test_forward_passes_need_torch_and_transformers_alone(tmp_path: Path) -> None:
    code = WITHOUT_PYDANTIC + "import runpy; runpy.run_module('bench.gpu', run_name='__main__', alter_sys=True)"
    found = benchmark(tmp_path, "-c", code, "--commit", "abc")
    assert found["machine"]["commit"] == "abc"
    skipped, figures = found["skipped"], found["figures"]
    assert skipped["worker llama"] == skipped["1.3B over HTTP"] == "needs pydantic"
    assert skipped["captured against eager"] == "needs CUDA"
    eager = figures["1.3B by tokens"]["16"]["eager"]
    assert eager.keys() == {"device_ms", "wall_ms", "host_ms", "tokens_per_second", "of_ceiling"}
    assert figures["8B lone"]["to_floor"] > 0
    assert figures["8B kernels at 16"]["top"][0]["microseconds"] > 0
    assert figures["1.3B alone and among"]["40"]["bit_identical"] or not SAME_BITS
    assert figures["1.3B padded, sorted"]["packed / padded"] > 0
    assert "8B at 64, of the matmul rate" in found["targets"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_step_on_a_stand_in_gpu(tmp_path: Path) -> None:
    found = benchmark(tmp_path, "-m", "bench.gpu", device="cuda")
    assert found["skipped"] == {}
    assert found["checks"]["worker gemma3_text against the CPU"]["ok"]
    served = found["figures"]["1.3B over HTTP"]
    assert served["queries × 16 beside bulk"]["p99_ms"] > 0
    assert found["targets"]["1.3B, HTTP / engine rate"]["value"] == served["http / engine"]


def test_the_tests_for_a_gpu_need_neither_plugins_nor_pydantic() -> None:
    no_plugins = "import os; os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'; "
    code = WITHOUT_PYDANTIC + no_plugins + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    printed = python("-c", code, "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu", "--collect-only", "-q")
    assert "test_captured_graphs_equal_the_plain_way" in printed
