"""The GPU benchmark on tiny shapes: it runs through, says what it left out, and finds the kernels in agreement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
NO_CUDA = not torch.cuda.is_available()


def run(part: str, folder: Path, *options: str, without: str = "") -> dict[str, Any]:
    """The figures of one part, which must be the same in its file and its last line."""
    command = ["-m", "bench.gpu"]
    if without:  # as on a machine that has no such package
        blocked = f"import sys, runpy; sys.modules[{without!r}] = None; sys.argv[0] = 'gpu'; "
        command = ["-c", blocked + "runpy.run_module('bench.gpu', run_name='__main__', alter_sys=True)"]
    ran = subprocess.run(
        [sys.executable, *command, part, "--shapes", "tiny", "--out", str(folder), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    document: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert json.loads((folder / f"gpu_{part}.json").read_text()) == document
    assert document["errors"] == {}
    return document


def test_kernels_agree(tmp_path: Path) -> None:
    found = run("kernels", tmp_path, "--commit", "abc", without="pydantic")
    assert found["machine"]["commit"] == "abc"
    assert {"ceiling bf16", "ceiling copy", "alone", "pooling", "fp8", "gemma3 d256 window bfloat16"} <= found[
        "figures"
    ].keys()
    assert found["checks"]
    assert all(check["ok"] for check in found["checks"].values())
    if NO_CUDA:
        assert found["skipped"]["flash attention"] == "needs CUDA"


def test_forward(tmp_path: Path) -> None:
    figures = run("forward", tmp_path)["figures"]
    eager = figures["1.3B eager"]
    assert {"device_ms", "wall_ms", "host_ms", "tokens_per_second", "of_ceiling"} <= eager["by_tokens"]["16"].keys()
    assert eager["lone"]["to_floor"] > 0
    assert figures["270M mixed"]["ours / padded, sorted"] > 0
    assert figures["1.3B sentence-transformers"]["tokens_per_second"] > 0


@pytest.mark.slow
def test_serve(tmp_path: Path) -> None:
    figures = run("serve", tmp_path)["figures"]["270M over HTTP"]
    assert figures["http / engine"] > 0
    assert figures["queries × 16 beside bulk"]["p99_ms"] > 0
