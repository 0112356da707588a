"""How long a batch of T tokens takes, from a few measurements: what the batcher plans with.

t(T) = max(floor, base + T·per_token). Below the crossover the device reads its weights once whatever T is, so tokens
are free; above it they are multiplied, at a constant rate, after a constant cost for each batch. (Williams, Waterman &
Patterson 2009, "Roofline".) No torch here, and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# How near to the highest rate a batch should come.
EFFICIENCY = 0.97

# A batch this many times the crossover is well in the compute-bound part, where mixed lengths can't drop out of it.
_CROSSOVERS = 4

# A device so slow that this takes longer than a batch should is used as well as it can be.
_LEAST_BATCH_TOKENS = 512


@dataclass(frozen=True)
class CostModel:
    """Seconds: of the smallest batch, of any batch before its tokens, and of each token."""

    floor: float
    base: float
    per_token: float

    def seconds(self, tokens: int) -> float:
        """How long a batch of so many tokens takes."""
        return max(self.floor, self.base + tokens * self.per_token)

    @property
    def crossover_tokens(self) -> float:
        """Up to here further tokens cost no time."""
        return max(self.floor - self.base, 0.0) / self.per_token

    @property
    def tokens_per_second(self) -> float:
        """What the device comes near to in large batches."""
        return 1 / self.per_token

    def efficient_tokens(self) -> int:
        """The smallest batch that reaches `EFFICIENCY` of the highest rate and lies well above the crossover."""
        amortized = EFFICIENCY / (1 - EFFICIENCY) * self.base / self.per_token
        return round(max(_CROSSOVERS * self.crossover_tokens, amortized))

    def tokens_within(self, seconds: float) -> int:
        """The largest batch that takes no longer than this; 0 if even the smallest does."""
        return int((seconds - self.base) / self.per_token) if seconds >= self.floor else 0

    def least_tokens_worth(self, computed: int, saved_seconds: float) -> int:
        """The smallest batch that is worth filling up to `computed` tokens, where computing just so many saves time."""
        limit = self.seconds(computed) - saved_seconds
        return math.ceil((limit - self.base) / self.per_token) if limit > self.floor else 0

    def batch_tokens(self, seconds: float, token_budget: int) -> int:
        """Tokens at which a batch is full enough: large enough to be efficient, quick enough to wait for."""
        quick = min(self.efficient_tokens(), self.tokens_within(seconds))
        return min(max(quick, _LEAST_BATCH_TOKENS), token_budget)


def fit(measured: Mapping[int, float]) -> CostModel:
    """The model nearest to measured seconds by tokens, in least squares of the relative error.

    Each way to split the measurements into a flat part and a rising one is tried.

    Raises:
        ValueError: for fewer than two measurements, or times that do not rise with the tokens at all.
    """
    points = sorted(measured.items())
    if len(points) < 2:
        raise ValueError("a cost model needs measurements at two sizes at least")
    candidates = [_fit_split(points, flat) for flat in range(len(points) - 1)]
    rising = [model for model in candidates if model.per_token > 0]
    if not rising:
        raise ValueError(f"more tokens take no more time in {dict(points)}: measure larger batches")
    return min(rising, key=lambda model: sum((model.seconds(tokens) / took - 1) ** 2 for tokens, took in points))


def _fit_split(points: list[tuple[int, float]], flat: int) -> CostModel:
    """The first `flat` points as a constant, a line of least relative error through the others."""
    rising = points[flat:]
    # Minimise Σ (a/t + b·T/t − 1)², a line in 1/t and T/t.
    uu = sum(1 / took**2 for _, took in rising)
    uv = sum(tokens / took**2 for tokens, took in rising)
    vv = sum((tokens / took) ** 2 for tokens, took in rising)
    u, v = sum(1 / took for _, took in rising), sum(tokens / took for tokens, took in rising)
    determinant = uu * vv - uv * uv
    base, per_token = (u * vv - v * uv) / determinant, (uu * v - uv * u) / determinant
    if base < 0:  # no batch costs less than nothing: a line through the origin
        base, per_token = 0.0, v / vv
    floor = sum(took for _, took in points[:flat]) / flat if flat else base
    return CostModel(max(floor, base), base, per_token)
