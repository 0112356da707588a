"""Which of the texts nearest to a query are its hard negatives.

The rules are those of sentence-transformers' `mine_hard_negatives`, under its names. `duplicate_score` is added: a text
nearly the same as a positive is a false negative, and one nearly the same as another negative teaches nothing new.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model_store.errors import UserError

# K candidates, P positives, D width

_Floats = NDArray[np.float32]


class MiningError(UserError):
    """Mining that makes no sense as asked for, or can't go on; the message names the way out."""


@dataclass(frozen=True)
class Rules:
    """Candidates are left out by score; of the others those from rank `range_min` to `range_max` may be negatives."""

    range_min: int = 0
    range_max: int | None = None
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    duplicate_score: float | None = None
    num_negatives: int = 3
    sampling_strategy: Literal["top", "random"] = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises MiningError for numbers that leave no candidate."""
        for name, least in (("num_negatives", 1), ("range_min", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise MiningError(f"{name} is {getattr(self, name)}: at least {least}")
        if self.range_max is not None and self.range_max - self.range_min < self.num_negatives:
            raise MiningError(
                f"range_max is {self.range_max}: at least range_min + num_negatives, which is "
                f"{self.range_min + self.num_negatives}"
            )

    def for_queries_with(self, most_positives: int) -> Rules:
        """With a `range_max`: that given, or sentence-transformers' default for so many positives of one query."""
        if self.range_max is not None:
            return self
        limits = (self.max_score, self.absolute_margin, self.relative_margin, self.duplicate_score)
        spare = 10 if any(limit is not None for limit in limits) else 1
        return replace(self, range_max=self.range_min + spare * self.num_negatives + most_positives)

    def choose(
        self, scores: _Floats, positive_scores: _Floats, near: Near | None, number: int
    ) -> tuple[list[int], Counter[str]]:
        """The places of the negatives of query `number` among its candidates; and by rule, how many were left out.

        `scores` (K,) are the candidates', falling; of several positives the one with the lowest score sets the margins.
        """
        left_out: Counter[str] = Counter()
        good = np.ones(len(scores), np.bool_)
        for name, wrong in self._wrong(scores, positive_scores.min()):
            left_out[name] += int((good & wrong).sum())
            good &= ~wrong
        places = [int(place) for place in np.flatnonzero(good)]
        if near is not None:
            distinct = near.distinct(places)
            left_out["duplicate_score"] += len(places) - len(distinct)
            places = distinct
        places = places[self.range_min : self.range_max]
        if self.sampling_strategy == "random" and len(places) > self.num_negatives:
            random = np.random.default_rng([self.seed, number])
            places = sorted(random.choice(places, self.num_negatives, replace=False).tolist())
        return places[: self.num_negatives], left_out

    def _wrong(self, scores: _Floats, positive: np.float32) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        if self.absolute_margin is not None:
            yield "absolute_margin", scores + self.absolute_margin > positive
        if self.relative_margin is not None:
            yield "relative_margin", scores > positive - abs(positive) * self.relative_margin
        if self.max_score is not None:
            yield "max_score", scores > self.max_score
        if self.min_score is not None:
            yield "min_score", scores < self.min_score


@dataclass(frozen=True)
class Near:
    """Near duplicates by vectors of the candidates (K, D) and the positives (P, D): their cosine is above `most`."""

    candidates: _Floats
    positives: _Floats
    most: float

    def distinct(self, places: list[int]) -> list[int]:
        """The places of candidates near no positive, and near no candidate that comes before."""
        of_positive = (self.candidates @ self.positives.T).max(axis=1) > self.most
        alike: NDArray[np.bool_] = self.candidates @ self.candidates.T > self.most
        kept: list[int] = []
        for place in places:
            if not of_positive[place] and not alike[place, kept].any():
                kept.append(place)
        return kept
