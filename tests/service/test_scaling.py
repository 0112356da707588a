"""How many replicas there should be: the policy as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from service.ray.scaling import BUSY, QUEUED_TOKENS, QueuedTokens, wanted_replicas


@dataclass
class Told:
    """What Ray tells the policy."""

    current_num_replicas: int
    aggregated_metrics: dict[str, dict[str, float]] | None = field(default_factory=dict)


@pytest.mark.parametrize(
    ("present", "for_queue", "for_work", "wanted"),
    [
        (1, 0.0, 0.0, 1),  # nothing to do
        (1, 0.9, 1.2, 1),  # busy, and nobody waits for long
        (1, 2.1, 1.2, 3),  # three would leave few enough waiting in each
        (4, 0.1, 2.4, 3),  # few wait, but two replicas could not do it
        (4, 0.1, 4.9, 4),  # busy alone is no reason for more
        (4, 6.0, 4.9, 6),
        (0, 0.0, 0.0, 1),
    ],
)
def test_replicas_follow_the_tokens_that_wait(present: int, for_queue: float, for_work: float, wanted: int) -> None:
    assert wanted_replicas(present, for_queue, for_work) == wanted


def test_replicas_are_counted_together() -> None:
    told = Told(2, {QUEUED_TOKENS: {"a": 9_000.0, "b": 16_000.0}, BUSY: {"a": 1.0, "b": 1.0}})
    assert QueuedTokens(target=10_000)(told) == (3, {})
    assert QueuedTokens(target=1_000_000)(told) == (2, {})
    told.aggregated_metrics = {QUEUED_TOKENS: {"a": 0.0, "b": 0.0}, BUSY: {"a": 0.3, "b": 0.3}}
    assert QueuedTokens()(told) == (1, {})
    assert QueuedTokens()(Told(2, None)) == (1, {})
