"""The server, its engines and `embed` as processes on stand-in GPUs: they start, and give the CPU's vectors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.text.tokenizer import TextTokenizer
from tests.cuda_stand_in import environment
from tests.e2e.process import ServerProcess
from tests.tiny import normalized

TEXTS = ["A plane is taking off.", "a", "the river and the mill " * 5]
QUICK = {"LLM2VEC_TOKEN_BUDGET": "64", "LLM2VEC_MAX_INPUT_TOKENS": "64", "LLM2VEC_CUDA_GRAPHS": "on"}


def assert_right(encoder: Path, found: object) -> None:
    """To the rounding of bfloat16."""
    on_cpu = Encoder.load(encoder, "cpu", "float32")
    rows = TextTokenizer.load(encoder, on_cpu.manifest).encode_batch(TEXTS, [""] * len(TEXTS))
    expected = normalized(on_cpu.encode(PackedBatch.pack(rows, on_cpu.manifest.pooling))).numpy()
    assert ((np.asarray(found) * expected).sum(1) > 0.999).all()


def vectors(server: ServerProcess) -> list[list[float]]:
    return [item["embedding"] for item in server.embed(TEXTS).json()["data"]]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_the_server_on_one_gpu(encoder: Path, device: str) -> None:
    with ServerProcess(encoder, {**environment(), **QUICK, "LLM2VEC_DEVICE": device}) as server:
        facts = server.wait_for("ready")
        assert (facts["device"], facts["dtype"], facts["attention"]) == ("cuda:0", "bfloat16", "torch-flash")
        assert server.wait_for("cuda_graphs is on")
        assert_right(encoder, vectors(server))
        assert server.stop() == 0


def test_an_engine_for_each_of_several_gpus(encoder: Path) -> None:
    with ServerProcess(encoder, {**environment(2), **QUICK, "LLM2VEC_DEVICE": "cuda:all"}) as server:
        engines = [server.wait_for(f"engine {number} ready")["device"] for number in range(2)]
        assert engines == ["cuda:0", "cuda:1"]
        assert_right(encoder, vectors(server))
        assert server.stop() == 0


def test_embed_on_a_gpu(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    command = ["-m", "service", "embed", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *command, "--model", str(encoder), "--device", "cuda"],
        env={**os.environ, **environment(), **QUICK, "LLM2VEC_COMPILE": "off"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    (shard,) = (tmp_path / "out").glob("*.parquet")
    assert_right(encoder, pyarrow.parquet.read_table(shard)["embedding"].to_pylist())


def test_a_driver_or_build_that_can_not_serve_says_so(encoder: Path) -> None:
    server = ServerProcess(encoder, {"LLM2VEC_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""})
    assert server.process.wait(100) == 1
    server.stop()
    assert "device 'cuda' can't be used: " in server.lines[-1]
    assert "set LLM2VEC_DEVICE=cpu" in server.lines[-1]
