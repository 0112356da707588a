"""How many replicas a cluster should have, by the tokens that wait: a policy for Ray Serve. It imports no Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

# The metrics of a replica: the tokens that wait, and the share of time that the device computed.
QUEUED_TOKENS, BUSY = "queued_tokens", "busy"


class Context(Protocol):
    """The used part of Ray Serve's `AutoscalingContext`: values by metric and replica."""

    current_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...


class QueuedTokens:
    """An autoscaling policy of Ray Serve: as many replicas as leave `target` tokens waiting in each.

    It removes no replica that the devices' work needs, even if few tokens wait: few may wait just because there are
    enough replicas.
    """

    def __init__(self, target: float = 20_000, most_busy: float = 0.8) -> None:
        self._target = target
        self._most_busy = most_busy

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        """How many replicas there should be; Ray then applies its own limits and delays."""
        told = context.aggregated_metrics or {}
        return (
            wanted_replicas(
                context.current_num_replicas,
                sum(told.get(QUEUED_TOKENS, {}).values()) / self._target,
                sum(told.get(BUSY, {}).values()) / self._most_busy,
            ),
            {},
        )


def wanted_replicas(present: int, for_queue: float, for_work: float) -> int:
    """As many replicas as the queues need, but no reduction below the number that the work needs."""
    return max(math.ceil(for_queue), min(math.ceil(for_work), present), 1)
