"""What the clients' vectors are compared with: the numbers of `POST /v1/embeddings` as decimal fractions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from model_store.encoder.devices import choose_device, choose_dtype
from tests.cpus import SAME_BITS, assert_same_vectors
from tests.e2e.process import ServerProcess

Vectors = NDArray[np.float32]

# The query instruction of the demo model's recipe.
QUERY = "Given a web search query, retrieve relevant passages that answer the query:"
SEPARATOR = " ||| "

QUESTION = "How much protein should a woman eat a day?"
PASSAGES = ["About 46 grams of protein a day is recommended for women.", "A plane is taking off."]
TEXTS = [*PASSAGES, "Größe 東京 🙂"]

# What the demo's server computes in, and whether a vector of it has the same bits in every batch.
_DEVICE = choose_device("auto")
DTYPE: Literal["bfloat16", "float32"] = "bfloat16" if choose_dtype("auto", _DEVICE) is torch.bfloat16 else "float32"
_SAME_BITS = SAME_BITS and _DEVICE.type == "cpu"

# Of a vector's cosine with one of two such vectors: no more than the length of their difference, sqrt(2 - 2 * 0.9995).
COSINE_TOLERANCE = 1e-5 if _SAME_BITS else 0.032


def reference(server: ServerProcess, texts: Sequence[str] | str, **fields: Any) -> Vectors:
    """(N, D): each text's vector, or with an instruction the vector of both."""
    answer = server.embed(list(texts) if not isinstance(texts, str) else texts, encoding_format="float", **fields)
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]], dtype=np.float32)


def assert_same(found: Any, expected: Any, what: str = "") -> None:
    """The demo model's vector, or rows of them, from two requests: equal bits where the device has them."""
    assert_same_vectors(found, expected, DTYPE, what, same_bits=_SAME_BITS)


def assert_same_but_for_arithmetic(found: Any, expected: Any) -> None:
    """As `assert_same`, where one of the two was calculated from the server's vectors."""
    if _SAME_BITS:
        np.testing.assert_allclose(_rows(found), _rows(expected), rtol=1e-5, atol=1e-7)
    else:
        assert_same(found, expected)


def assert_close(found: Any, expected: Any) -> None:
    """The same but for rounding: as the tiny model's, whose float32 products depend on the number of rows anywhere."""
    assert_same_vectors(found, expected, "float32", same_bits=False)


def assert_different(found: Any, other: Any) -> None:
    """By more than rounding, in every row."""
    assert (np.abs(_rows(found) - _rows(other)).max(axis=1) > 2e-2).all()


def _rows(numbers: Any) -> Vectors:
    return np.atleast_2d(np.array(numbers, dtype=np.float32))
