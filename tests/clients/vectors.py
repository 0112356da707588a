"""What the clients' vectors are compared with: the numbers of `POST /v1/embeddings` as decimal fractions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.e2e.process import ServerProcess

Vectors = NDArray[np.float32]

# The query instruction of the demo model's recipe.
QUERY = "Given a web search query, retrieve relevant passages that answer the query:"
SEPARATOR = " ||| "

QUESTION = "How much protein should a woman eat a day?"
PASSAGES = ["About 46 grams of protein a day is recommended for women.", "A plane is taking off."]
TEXTS = [*PASSAGES, "Größe 東京 🙂"]


def reference(server: ServerProcess, texts: Sequence[str] | str, **fields: Any) -> Vectors:
    """(N, D): each text's vector, or with an instruction the vector of both."""
    answer = server.embed(list(texts) if not isinstance(texts, str) else texts, encoding_format="float", **fields)
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]], dtype=np.float32)


def assert_same(found: Any, expected: Any, what: str = "") -> None:
    """Bit for bit the same float32: a vector, or rows of them."""
    np.testing.assert_array_equal(_rows(found), _rows(expected), err_msg=what)


def assert_close(found: Any, expected: Any) -> None:
    """The same but for rounding: as the tiny model's, whose float32 products depend on the company a text is in."""
    np.testing.assert_allclose(_rows(found), _rows(expected), rtol=0, atol=1e-6)


def assert_different(found: Any, other: Any) -> None:
    """By more than rounding, in every row."""
    assert (np.abs(_rows(found) - _rows(other)).max(axis=1) > 1e-3).all()


def _rows(numbers: Any) -> Vectors:
    return np.atleast_2d(np.array(numbers, dtype=np.float32))
