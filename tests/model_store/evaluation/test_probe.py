"""The probe against scikit-learn's logistic regression, and its measures against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest

from model_store.evaluation.probe import Probe, ProbeError, accuracy, macro_f1, sample


def examples(seed: int) -> tuple[np.ndarray, list[str]]:
    """Four overlapping classes in 12 dimensions of very different scale, one of them constant."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, size=600)
    features = random.normal(size=(600, 12)) + np.random.default_rng(9).normal(size=(4, 12))[labels]
    features *= np.logspace(-3, 3, 12)
    features[:, 5] = 7
    return features.astype(np.float32), [f"class {label}" for label in labels]


def test_it_is_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    (features, labels), (others, _) = examples(0), examples(1)
    mean, scale = features.mean(0), np.maximum(features.std(0, ddof=1), 1e-6)
    for penalty in (1.0, 100.0):
        model = linear_model.LogisticRegression(C=1 / penalty, max_iter=1000, tol=1e-8)
        model.fit((features - mean) / scale, labels)
        probe = Probe.fit(features, labels, penalty)
        np.testing.assert_allclose(probe.weight.numpy(), model.coef_, atol=5e-3)
        agree = accuracy(model.predict((others - mean) / scale).tolist(), probe.predict(others))
        assert agree > 0.99


def test_it_learns_and_what_it_has_not_seen_is_an_error() -> None:
    features, labels = examples(0)
    others, expected = examples(1)
    assert accuracy(expected, Probe.tuned(features, labels).predict(others)) > 0.8
    shuffled = np.random.default_rng(2).permutation(labels).tolist()
    assert accuracy(expected, Probe.tuned(features, shuffled).predict(others)) < 0.4


def test_the_penalty_is_chosen_by_what_is_held_out() -> None:
    """Two dimensions that tell the classes, among 400 of noise, which a weak penalty learns by heart."""
    random = np.random.default_rng(4)
    labels = random.integers(0, 2, size=3000)
    features = random.normal(size=(3000, 402)).astype(np.float32)
    features[:, :2] += 1.5 * np.eye(2)[labels]
    names, train, test = [str(label) for label in labels], slice(0, 1000), slice(1000, None)
    tuned = accuracy(names[test], Probe.tuned(features[train], names[train]).predict(features[test]))
    weak = accuracy(names[test], Probe.fit(features[train], names[train], 1.0).predict(features[test]))
    assert tuned > weak + 0.03


def test_a_sample_is_the_same_each_time_and_from_everywhere() -> None:
    drawn = sample(range(1000), 50)
    assert drawn == sample(range(1000), 50) == sorted(set(drawn))
    assert len(drawn) == 50
    assert drawn[0] < 200 < 800 < drawn[-1]
    assert sample("abc", None) == sample("abc", 7) == ["a", "b", "c"]


def test_one_class_is_refused() -> None:
    with pytest.raises(ProbeError, match="there is yes"):
        Probe.tuned(np.zeros((3, 2), dtype=np.float32), ["yes"] * 3)


def test_measures_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(3)
    expected = random.choice(["a", "b", "c"], 200, p=[0.7, 0.2, 0.1]).tolist()
    found = random.choice(["a", "b", "d"], 200).tolist()
    assert accuracy(expected, found) == pytest.approx(metrics.accuracy_score(expected, found))
    assert macro_f1(expected, found) == pytest.approx(metrics.f1_score(expected, found, average="macro"))
