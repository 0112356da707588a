"""Semantic textual similarity: do the cosines of sentence pairs rank them as people do?

The measure is Spearman's rank correlation of cosine and score, as for the STS benchmark (Cer et al. 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from model_store.evaluation.files import DatasetError, number_field, read_table, text_field
from model_store.evaluation.report import Score, TextVectors


@dataclass(frozen=True)
class ScoredPair:
    """Two sentences, and people's score of their similarity."""

    first: str
    second: str
    score: float


def read_pairs(path: Path) -> list[ScoredPair]:
    """Pairs from a file with the columns score, sentence1 and sentence2. It may be gzipped.

    The file is tab-separated with a header and no quoting, as GLUE distributes the STS benchmark, or JSON lines.

    Raises:
        DatasetError: for a line that lacks a column, or fewer than two different scores.
    """
    pairs = [
        ScoredPair(
            text_field(path, number, row, "sentence1"),
            text_field(path, number, row, "sentence2"),
            number_field(path, number, row, "score"),
        )
        for number, row in read_table(path)
    ]
    if len({pair.score for pair in pairs}) < 2:
        raise DatasetError(f"{path} holds {len(pairs)} pairs: a correlation needs at least two, of different scores")
    return pairs


class Sts:
    """Spearman's correlation on the pairs of a file; `instruction` is put before every sentence."""

    def __init__(self, path: Path, instruction: str | None = None) -> None:
        self._name, self._instruction, self._pairs = f"STS, {path.name}", instruction, read_pairs(path)

    def evaluate(self, model: str, vectors: TextVectors) -> list[Score]:
        """One score for each setting."""
        texts = [text for pair in self._pairs for text in (pair.first, pair.second)]
        return [
            Score(model, self._name, "Spearman", setting, evaluate_sts(self._pairs, found))
            for setting, found in vectors.embed(texts, self._instruction).items()
        ]


def evaluate_sts(pairs: Sequence[ScoredPair], vectors: NDArray[np.float32]) -> float:
    """Spearman's correlation; `vectors` (2n, D), normalised, holds each pair's two vectors in turn."""
    cosines = (vectors[0::2] * vectors[1::2]).sum(axis=1)
    return float(spearmanr(cosines, [pair.score for pair in pairs]).statistic)
