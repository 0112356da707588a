"""How many replicas a cluster should have, by the tokens that wait: a policy for Ray Serve, without Ray in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

# What replicas tell: tokens that wait, and the share of time that the device computed.
QUEUED_TOKENS, BUSY = "queued_tokens", "busy"


class Context(Protocol):
    """What Ray Serve's `AutoscalingContext` has of use here: values by metric and replica."""

    current_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...


class QueuedTokens:
    """Ray Serve's autoscaling policy: as many replicas as leave `target` tokens waiting in each.

    None is taken away of those that the devices' work needs, whatever waits: where few tokens wait because there are
    enough replicas, one fewer would be too few.
    """

    def __init__(self, target: float = 20_000, most_busy: float = 0.8) -> None:
        self._target = target
        self._most_busy = most_busy

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        """How many replicas there should be; Ray applies its limits and delays."""
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
    """As many as the queues ask for, but of those present none fewer than the work does."""
    return max(math.ceil(for_queue), min(math.ceil(for_work), present), 1)
