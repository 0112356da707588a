"""How long a batch of T tokens takes, estimated from a few measurements. The batcher plans with it.

t(T) = max(floor, base + T·per_token). Below the crossover the time is that of reading the weights once, whatever T is,
so further tokens are free. Above it the time is that of the multiplications: a constant cost for each batch, then a
constant rate. (Williams, Waterman & Patterson 2009, "Roofline".) No torch here, and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# The share of the highest rate that a batch should reach.
EFFICIENCY = 0.97

# A batch this many times the crossover stays compute-bound, also when its texts have mixed lengths.
_CROSSOVERS = 4

# Batches get no smaller than this, even on a device that needs longer for it than a batch should take.
_LEAST_BATCH_TOKENS = 512


@dataclass(frozen=True)
class CostModel:
    """Seconds of the smallest batch (`floor`), of any batch before its tokens (`base`), and of each token."""

    floor: float
    base: float
    per_token: float

    def seconds(self, tokens: int) -> float:
        return max(self.floor, self.base + tokens * self.per_token)

    @property
    def crossover_tokens(self) -> float:
        """The batch size up to which further tokens cost no time."""
        return max(self.floor - self.base, 0.0) / self.per_token

    @property
    def tokens_per_second(self) -> float:
        """The rate that the device approaches in large batches."""
        return 1 / self.per_token

    def efficient_tokens(self) -> int:
        """The smallest batch that reaches `EFFICIENCY` of the highest rate and lies well above the crossover."""
        amortized = EFFICIENCY / (1 - EFFICIENCY) * self.base / self.per_token
        return round(max(_CROSSOVERS * self.crossover_tokens, amortized))

    def tokens_within(self, seconds: float) -> int:
        """The largest batch that takes no longer than this; 0 if even the smallest takes longer."""
        return int((seconds - self.base) / self.per_token) if seconds >= self.floor else 0

    def least_tokens_worth(self, computed: int, saved_seconds: float) -> int:
        """The smallest batch worth padding to `computed` tokens, where a batch of that size saves `saved_seconds`."""
        limit = self.seconds(computed) - saved_seconds
        return math.ceil((limit - self.base) / self.per_token) if limit > self.floor else 0

    def batch_tokens(self, seconds: float, token_budget: int) -> int:
        """Tokens at which a batch is full: large enough to be efficient, and quick enough to wait for."""
        quick = min(self.efficient_tokens(), self.tokens_within(seconds))
        return min(max(quick, _LEAST_BATCH_TOKENS), token_budget)


def fit(measured: Mapping[int, float]) -> CostModel:
    """Fit the model to measured seconds by tokens, by least squares of the relative error.

    It tries each way to split the measurements into a flat part and a rising part.

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
    """Fit a constant to the first `flat` points, and the line of least relative error to the others."""
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
