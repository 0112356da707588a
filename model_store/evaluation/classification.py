"""Classification by a linear probe: how well logistic regression finds a text's label from its frozen vector.

The probe is deterministic: features are standardised, L-BFGS minimises a convex loss from zero, and the weight penalty
is the one that does best on a tenth of the examples, the same each time: too weak a one costs a part-of-speech probe
points.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from model_store.errors import UserError
from model_store.evaluation.files import DatasetError, read_table, text_field
from model_store.evaluation.report import Score, TextVectors

_MOST_STEPS = 200

# From strong to weak.
_PENALTIES = (1000.0, 100.0, 10.0, 1.0)

Example = TypeVar("Example")


class ProbeError(UserError):
    """Examples that no probe can be fitted to."""


def read_labelled(path: Path) -> list[tuple[str, str]]:
    """(text, label) from `text` and `label` of JSON lines or a tab-separated file with a header (may be .gz).

    Raises:
        DatasetError: for a line without a text or a label, or a file without lines.
    """
    rows = list(read_table(path))
    if not rows:
        raise DatasetError(f"{path} holds no text")
    return [(text_field(path, number, row, "text"), _label(path, number, row.get("label"))) for number, row in rows]


class Classification:
    """A probe fitted to `limit` texts of one file and tried on another; `instruction` is put before every text."""

    def __init__(self, train: Path, test: Path, instruction: str | None = None, limit: int | None = None) -> None:
        self._name, self._instruction = f"classification, {test.name}", instruction
        self._train, self._test = sample(read_labelled(train), limit), read_labelled(test)

    def evaluate(self, model: str, vectors: TextVectors) -> list[Score]:
        """Accuracy and macro F1 for each setting."""
        train = vectors.embed([text for text, _ in self._train], self._instruction)
        test = vectors.embed([text for text, _ in self._test], self._instruction)
        expected = [label for _, label in self._test]
        scores = []
        for setting in test:
            found = tuned_probe(train[setting], [label for _, label in self._train]).predict(test[setting])
            macro_f1 = float(f1_score(expected, found, average="macro"))
            scores.append(Score(model, self._name, "accuracy", setting, float(accuracy_score(expected, found))))
            scores.append(Score(model, self._name, "macro F1", setting, macro_f1))
        return scores


def tuned_probe(features: NDArray[np.float32], labels: Sequence[str]) -> Any:
    """`fit_probe` to all examples, with the penalty before a weaker one does no better on a tenth held out.

    Raises:
        ProbeError: for fewer than two classes.
    """
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[sample(range(len(labels)), len(labels) // 10)] = True
    names = np.asarray(labels)
    kept = names[~held_out]
    tried = held_out & np.isin(names, kept)
    best, least = _PENALTIES[-1], float("inf")
    for penalty in _PENALTIES if tried.any() and len(set(kept)) > 1 else ():
        probe = fit_probe(features[~held_out], kept.tolist(), penalty)
        loss = log_loss(names[tried], probe.predict_proba(features[tried]), labels=probe.classes_)
        if not loss < least:
            break
        best, least = penalty, loss
    return fit_probe(features, labels, best)


def fit_probe(features: NDArray[np.float32], labels: Sequence[str], penalty: float) -> Any:
    """A scikit-learn classifier that minimises Σ cross-entropy + penalty/2 · Σ weight², summed over all classes.

    `features` are (N, D), and `labels` one for each of them.

    Raises:
        ProbeError: for fewer than two classes.
    """
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ProbeError(f"a probe needs two classes at least, and there is {', '.join(classes) or 'no example'}")
    # Of two classes scikit-learn has one row of weights, the difference of both: its square is twice the sum of theirs.
    strength = penalty / 2 if len(classes) == 2 else penalty
    regression = LogisticRegression(C=1 / strength, max_iter=_MOST_STEPS, tol=1e-5)
    probe = make_pipeline(StandardScaler(), regression)
    with warnings.catch_warnings():
        # Weights that are still moving after so many steps tell classes apart no better when they have settled.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(features, labels)


def sample(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """As many of the examples in their order, drawn at random but the same each time; all of them without a limit."""
    if limit is None or limit >= len(examples):
        return list(examples)
    return [examples[place] for place in sorted(random.Random(0).sample(range(len(examples)), limit))]


def _label(path: Path, number: int, value: object) -> str:
    if not isinstance(value, str | int):
        raise DatasetError(f"{path}, line {number}: the label is {value!r}, neither text nor a whole number")
    return str(value)
