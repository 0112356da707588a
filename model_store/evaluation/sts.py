"""Semantic textual similarity: does the cosine of two sentences' vectors rank pairs as people do?

Spearman's rank correlation of cosine and score, as the STS benchmark (Cer et al. 2017) is reported.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr


class DatasetError(ValueError):
    """An evaluation file that can't be read; the message names file and line."""


@dataclass(frozen=True)
class ScoredPair:
    """Two sentences and how alike people found them."""

    first: str
    second: str
    score: float


def read_pairs(path: Path) -> list[ScoredPair]:
    """Pairs from a tab-separated file (may be .gz) with a header naming score, sentence1 and sentence2.

    Raises:
        DatasetError: for a missing file or column, or a line that has no score.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} can't be read: {error.strerror}") from error
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    reader = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    missing = {"score", "sentence1", "sentence2"} - set(reader.fieldnames or ())
    if missing:
        raise DatasetError(f"{path} has no column {', '.join(sorted(missing))}")
    pairs = []
    for row in reader:
        try:
            pairs.append(ScoredPair(row["sentence1"], row["sentence2"], float(row["score"])))
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{path}, line {reader.line_num}: {error}") from error
    if len(pairs) < 2:
        raise DatasetError(f"{path} holds {len(pairs)} pairs: a correlation needs at least two")
    return pairs


def evaluate_sts(pairs: Sequence[ScoredPair], vectors: NDArray[np.float32]) -> float:
    """Spearman's correlation; `vectors` (2n, D), normalised, holds each pair's two vectors in turn."""
    cosines = (vectors[0::2] * vectors[1::2]).sum(axis=1)
    return float(spearmanr(cosines, [pair.score for pair in pairs]).statistic)
