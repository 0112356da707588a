"""The probe: what it minimises, and how its penalty is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from model_store.evaluation.classification import ProbeError, fit_probe, sample, tuned_probe


def examples(seed: int) -> tuple[np.ndarray, list[str]]:
    """Four overlapping classes in 12 dimensions of very different scale, one of them constant."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, size=600)
    features = random.normal(size=(600, 12)) + np.random.default_rng(9).normal(size=(4, 12))[labels]
    features *= np.logspace(-3, 3, 12)
    features[:, 5] = 7
    return features.astype(np.float32), [f"class {label}" for label in labels]


@pytest.mark.parametrize("classes", [2, 4])
def test_it_minimises_the_stated_loss(classes: int) -> None:
    """By its gradient at the weights that it finds, in which the penalty stands as it is stated."""
    features, labels = examples(0)
    kept = np.isin(labels, sorted(set(labels))[:classes])
    features, labels = features[kept], np.asarray(labels)[kept].tolist()
    for penalty in (1.0, 100.0):
        probe = fit_probe(features, labels, penalty)
        inputs, weight = probe[0].transform(features), probe[-1].coef_
        if classes == 2:
            weight = np.concatenate([-weight, weight]) / 2
        wrong = probe.predict_proba(features) - (np.asarray(labels)[:, None] == probe.classes_)
        gradient = wrong.T @ inputs + penalty * weight
        assert np.abs(gradient).max() / len(labels) < 1e-4


def test_it_learns_and_what_it_has_not_seen_is_an_error() -> None:
    features, labels = examples(0)
    others, expected = examples(1)
    assert tuned_probe(features, labels).score(others, expected) > 0.8
    shuffled = np.random.default_rng(2).permutation(labels).tolist()
    assert tuned_probe(features, shuffled).score(others, expected) < 0.4


def test_the_penalty_is_chosen_by_what_is_held_out() -> None:
    """Two dimensions that tell the classes, among 400 of noise, which a weak penalty learns by heart."""
    random = np.random.default_rng(4)
    labels = random.integers(0, 2, size=3000)
    features = random.normal(size=(3000, 402)).astype(np.float32)
    features[:, :2] += 1.5 * np.eye(2)[labels]
    names, train, test = [str(label) for label in labels], slice(0, 1000), slice(1000, None)
    tuned = tuned_probe(features[train], names[train]).score(features[test], names[test])
    weak = fit_probe(features[train], names[train], 1.0).score(features[test], names[test])
    assert tuned > weak + 0.03


def test_a_sample_is_the_same_each_time_and_from_everywhere() -> None:
    drawn = sample(range(1000), 50)
    assert drawn == sample(range(1000), 50) == sorted(set(drawn))
    assert len(drawn) == 50
    assert drawn[0] < 200 < 800 < drawn[-1]
    assert sample("abc", None) == sample("abc", 7) == ["a", "b", "c"]


def test_one_class_is_refused() -> None:
    with pytest.raises(ProbeError, match="there is yes"):
        tuned_probe(np.zeros((3, 2), dtype=np.float32), ["yes"] * 3)
