"""A linear probe: multinomial logistic regression on frozen vectors, which shows what they hold.

The result is deterministic: features are standardised, and L-BFGS minimises a convex loss from zero. The weight penalty
is chosen on a tenth of the examples, the same each time, as too weak a penalty costs a part-of-speech probe points.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model_store.errors import UserError

# N examples, D width, C classes

_MOST_STEPS = 200

# The penalties that are tried, from strong to weak, as 1/C in scikit-learn.
_PENALTIES = (1000.0, 100.0, 10.0, 1.0)

Example = TypeVar("Example")


class ProbeError(UserError):
    """Examples to which no probe can be fitted."""


@dataclass(frozen=True)
class Probe:
    """Fitted weights, and the mean and scale that standardise features before them."""

    classes: tuple[str, ...]
    mean: Tensor  # (D,)
    scale: Tensor  # (D,)
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)

    @classmethod
    def tuned(cls, features: NDArray[np.float32], labels: Sequence[str]) -> Probe:
        """Fit to all examples. Weaker penalties are tried until one does no better on a held-out tenth.

        Raises:
            ProbeError: for fewer than two classes.
        """
        held_out = np.zeros(len(labels), dtype=bool)
        held_out[sample(range(len(labels)), len(labels) // 10)] = True
        names = np.asarray(labels)
        kept, expected = names[~held_out].tolist(), names[held_out].tolist()
        best, least = _PENALTIES[-1], float("inf")
        for penalty in _PENALTIES if expected and len(set(kept)) > 1 else ():
            loss = cls.fit(features[~held_out], kept, penalty)._loss(features[held_out], expected)
            if not loss < least:
                break
            best, least = penalty, loss
        return cls.fit(features, labels, best)

    @classmethod
    def fit(cls, features: NDArray[np.float32], labels: Sequence[str], penalty: float) -> Probe:
        """Minimise Σ cross-entropy + penalty/2 · Σ weight², like scikit-learn's LogisticRegression with C = 1/penalty.

        `features` are (N, D), with one label for each row.

        Raises:
            ProbeError: for fewer than two classes.
        """
        classes = tuple(sorted(set(labels)))
        if len(classes) < 2:
            raise ProbeError(f"a probe needs two classes at least, and there is {', '.join(classes) or 'no example'}")
        place = {name: number for number, name in enumerate(classes)}
        targets = torch.tensor([place[label] for label in labels])
        inputs = torch.from_numpy(features)
        mean, scale = inputs.mean(0), inputs.std(0).clamp_min(1e-6)
        inputs = (inputs - mean) / scale
        weight = torch.zeros(len(classes), inputs.shape[1], requires_grad=True)
        bias = torch.zeros(len(classes), requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=_MOST_STEPS, tolerance_grad=1e-5, history_size=10, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            # The mean, not the sum, so that the tolerances mean the same for any number of examples.
            value = F.cross_entropy(F.linear(inputs, weight, bias), targets)
            value = value + penalty / 2 * weight.square().sum() / len(targets)
            value.backward()
            return value

        optimizer.step(loss)
        return cls(classes, mean, scale, weight.detach(), bias.detach())

    def predict(self, features: NDArray[np.float32]) -> list[str]:
        """The likeliest class of each row of (N, D) features."""
        return [self.classes[number] for number in self._logits(features).argmax(1).tolist()]

    def _logits(self, features: NDArray[np.float32]) -> Tensor:
        return F.linear((torch.from_numpy(features) - self.mean) / self.scale, self.weight, self.bias)

    def _loss(self, features: NDArray[np.float32], labels: Sequence[str]) -> float:
        """The mean cross-entropy of the examples whose class the probe knows."""
        known = [place for place, label in enumerate(labels) if label in self.classes]
        targets = torch.tensor([self.classes.index(labels[place]) for place in known], dtype=torch.long)
        return float(F.cross_entropy(self._logits(features[known]), targets))


def sample(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """`limit` of the examples, in their order, drawn at random but the same each time. Without a limit all of them."""
    if limit is None or limit >= len(examples):
        return list(examples)
    return [examples[place] for place in sorted(random.Random(0).sample(range(len(examples)), limit))]


def accuracy(expected: Sequence[str], found: Sequence[str]) -> float:
    """The share of labels that are right."""
    return sum(a == b for a, b in zip(expected, found, strict=True)) / len(expected)


def macro_f1(expected: Sequence[str], found: Sequence[str]) -> float:
    """The mean over the expected and found classes of the harmonic mean of precision and recall."""
    scores = []
    for name in {*expected, *found}:
        right = sum(a == b == name for a, b in zip(expected, found, strict=True))
        scores.append(2 * right / (expected.count(name) + found.count(name)))
    return sum(scores) / len(scores)
