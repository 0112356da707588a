"""The packaged real model, from GGUF to a vector over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_store.build.self_test import SelfTestError, check_equal_bits
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.text.tokenizer import TextTokenizer, TokenizedText
from service.cli import main
from tests.cpus import SAME_BITS, assert_same_vectors
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TEXTS = ["A plane is taking off.", "An air plane is taking off.", "A man is playing a flute."]


@pytest.fixture(scope="module")
def server(demo_encoder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(demo_encoder, {"LLM2VEC_COMPILE": "on"}) as running:
        yield running


def test_sigterm_while_building_leaves_nothing_behind(tmp_path: Path) -> None:
    server = ServerProcess("demo", {"LLM2VEC_MODELS_DIR": str(tmp_path)})
    server.eventually(lambda: any(tmp_path.iterdir()), seconds=100)
    assert server.stop() == 0
    assert not list(tmp_path.iterdir())


def test_building_it_again_finds_it_there(demo_encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--recipe", "demo", "--out", str(demo_encoder)]) == 0
    assert "has it already" in capsys.readouterr().out


def test_verify_finds_nothing(demo_encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(demo_encoder)]) == 0
    report = capsys.readouterr().out
    assert "236 tensors" in report
    assert "FAILED" not in report


def test_alike_texts_have_alike_vectors(server: ServerProcess) -> None:
    vectors = np.array([item["embedding"] for item in server.embed(TEXTS).json()["data"]])
    assert vectors.shape == (3, 640)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.9 > cosines[0, 2]


@pytest.mark.parametrize("products", ["plain", "packed", "by blocks"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_text_s_vector_is_the_same_alone_among_others_and_beside_a_long_one(
    demo_encoder: Path, dtype: Any, products: str
) -> None:
    """To the bit where the CPU has that, else within its rounding: see tests/cpus.py and docs/fidelity.md."""
    encoder = Encoder.load(demo_encoder, device="cpu", dtype=dtype)
    same_bits = SAME_BITS
    if products != "plain":
        encoder.pack_weights(equal_bits=products == "by blocks")
    if products == "by blocks":
        try:
            check_equal_bits(encoder)
        except SelfTestError as error:
            pytest.skip(str(error))
        same_bits = True
    tokenizer = TextTokenizer.load(demo_encoder, encoder.manifest)
    others = tokenizer.encode_batch([f"sentence {i} " * (i % 9 + 1) for i in range(64)], [""] * 64)
    long = TokenizedText((others[8].token_ids * 200)[:4096], 1)

    def vectors(rows: list[TokenizedText]) -> torch.Tensor:
        return encoder.encode(PackedBatch.pack(rows, "mean"))

    texts = tokenizer.encode_batch([TEXTS[0], "a", "the river and the mill " * 12], [""] * 3)
    beside_long = vectors([long, *texts])[1:]
    for text, beside in zip(texts, beside_long, strict=True):
        (alone,) = vectors([text])
        assert_same_vectors(
            alone, vectors([*others[:31], text, *others[31:]])[31], dtype, "among 64 others", same_bits=same_bits
        )
        assert_same_vectors(alone, beside, dtype, "beside 4096 tokens", same_bits=same_bits)


def test_sts_of_a_few_pairs(server: ServerProcess, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(
        "score\tsentence1\tsentence2\n"
        "5.0\tA plane is taking off.\tAn air plane is taking off.\n"
        "3.8\tA man is playing a large flute.\tA man is playing a flute.\n"
        "0.5\tA man is smoking.\tA man is skating.\n"
        "0.0\tThe stock market fell on Friday.\tA cat is playing a piano.\n"
    )
    assert main(["eval", "--sts", str(pairs), "--url", server.base_url, "--json", str(tmp_path / "s.json")]) == 0
    (score,) = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert score["value"] > 0.5
