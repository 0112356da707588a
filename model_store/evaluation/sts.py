"""Semantic textual similarity: does the cosine of two sentences' vectors rank pairs as people do?

Spearman's rank correlation of cosine and score, as the STS benchmark (Cer et al. 2017) is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from model_store.evaluation.files import DatasetError, number_field, read_table, text_field
from model_store.evaluation.report import Score
from model_store.evaluation.text_vectors import TextVectors


@dataclass(frozen=True)
class ScoredPair:
    """Two sentences and how alike people found them."""

    first: str
    second: str
    score: float


def read_pairs(path: Path) -> list[ScoredPair]:
    """Pairs from a file that names score, sentence1 and sentence2, and may be gzipped.

    It is tab-separated with a header and no quoting, as the STS benchmark is distributed with GLUE, or JSON lines.

    Raises:
        DatasetError: for a line that lacks one of them, or fewer than two pairs.
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

    def __init__(self, path: Path, instruction: str = "") -> None:
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
