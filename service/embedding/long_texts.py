"""Texts that are longer than the server reads: refused, cut, or read in chunks whose mean is their vector.

Pure functions. An input becomes a list of rows: one row, or one for each of its chunks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from model_store.text.tokenizer import TokenizedText
from service.embedding.bounds import check_length, check_numbers, check_tokens
from service.embedding.requests import EmbedRequest
from service.embedding.rows import EmbedRow, Vector
from service.embedding.spans import runs_of_tokens
from service.errors import InvalidRequest, NonFiniteEmbedding


def fit(
    rows: Sequence[TokenizedText], request: EmbedRequest, first: int, max_input_tokens: int, max_request_tokens: int
) -> list[list[TokenizedText]]:
    """The rows of each input, none longer than `max_input_tokens`; the first of the inputs has the index `first`.

    Raises:
        InvalidRequest: for an input that is too long where the request does not say how to shorten it, for an
            instruction that leaves no room for a text, or for too many tokens together.
    """
    fitted, tokens = [], 0
    for index, row in enumerate(rows, first):
        if len(row) <= max_input_tokens:
            fitted.append([row])
            tokens += len(row)
            continue
        if request.overflow == "error":
            check_length(len(row), max_input_tokens, index, request.param)
        if row.room(max_input_tokens) < 1:
            raise InvalidRequest(
                f"the instruction of input index {index} leaves no room for a text: its {row.head} tokens and "
                f"the model's own are more than the {max_input_tokens} that it reads",
                "context_length_exceeded",
                "instruction",
            )
        # Each chunk repeats the instruction, so all chunks together can have many times the tokens that were sent.
        mean = request.overflow == "mean"
        tokens += row.chunk_tokens(max_input_tokens) if mean else max_input_tokens
        check_tokens(tokens, max_request_tokens)
        fitted.append(row.chunks(max_input_tokens) if mean else [row.shortened(max_input_tokens, request.keep)])
    return fitted


def embed_rows(fitted: Sequence[Sequence[TokenizedText]], request: EmbedRequest, model_width: int) -> list[EmbedRow]:
    """The rows of all inputs in order, as they are queued."""
    width = request.dimensions or model_width
    if request.each_token:
        check_numbers(count_tokens(fitted) * width)
        fitted = [[replace(row, spans=tuple(runs_of_tokens(range(len(row)), 1))) for row in rows] for rows in fitted]
    # The mean of chunks is taken of whole vectors and cut to its width afterwards.
    return [
        EmbedRow(row, model_width if len(rows) > 1 else width, request.normalize) for rows in fitted for row in rows
    ]


def count_tokens(fitted: Iterable[Iterable[TokenizedText]]) -> int:
    return sum(len(row) for rows in fitted for row in rows)


def input_of(row: int | None, fitted: Sequence[Sequence[TokenizedText]]) -> int | None:
    """The index of the input that a row belongs to."""
    return None if row is None else bisect_right(list(accumulate(map(len, fitted))), row)


def means(
    fitted: Sequence[Sequence[TokenizedText]], vectors: Sequence[Vector], width: int, normalize: bool
) -> list[Vector]:
    """One vector for each input: the mean of its chunks' vectors, each weighted by the tokens that it pooled.

    Raises:
        NonFiniteEmbedding: where the chunks of an input cancel each other out, so that their mean has no direction.
    """
    remaining = iter(vectors)
    found: list[Vector] = []
    for parts in fitted:
        own = [next(remaining) for _ in parts]
        if len(parts) == 1:
            found += own
            continue
        pooled = np.array([len(part) - part.span_start for part in parts], dtype=np.float32)
        mean: Vector = ((pooled / pooled.sum()) @ np.stack(own))[:width]
        length = np.linalg.norm(mean) if normalize else np.float32(1)
        if not (length > 0 and np.isfinite(mean.sum() / length)):
            raise NonFiniteEmbedding("the chunks of this input have no finite mean of length 1").at(len(found))
        found.append(mean / length)
    return found
