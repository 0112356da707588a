"""A front-end process: HTTP and tokenizing for engines in other processes. `python -m service.processes.frontend FD`"""

from __future__ import annotations

import socket
import sys

from service.batching.pace import LEAST_STUCK_SECONDS
from service.embedding.backend import Served
from service.metrics import Metrics
from service.processes.child import Child, inherited
from service.processes.remote import RemoteBackend
from service.server.process import answer, make_app
from service.server.startup import load_tokenizer

# An engine says every second that it is alive; a few seconds of delay do not count as silence.
_LEAST_SILENCE_SECONDS = 10.0


def silence_seconds(stuck_batch_seconds: float | None) -> float:
    """Seconds without a word from an engine after which it counts as lost."""
    return max(stuck_batch_seconds or LEAST_STUCK_SECONDS, _LEAST_SILENCE_SECONDS)


def main() -> int:
    child = Child()
    assignment, metrics = child.assignment, Metrics()
    settings, manifest = assignment.settings, assignment.manifest
    tokenizer = load_tokenizer(assignment.folder, manifest, settings)
    backend = RemoteBackend(
        inherited(assignment.engines),
        inherited(assignment.front_ends),
        metrics,
        silence_seconds(settings.stuck_batch_seconds),
        settings.max_queued_tokens,
    )
    served = Served(settings, manifest, tokenizer, assignment.limits, backend, metrics)
    then, message = (lambda facts: child.say_ready()), f"{assignment.name} ready"
    assert assignment.listener is not None
    with socket.socket(fileno=assignment.listener) as listener:
        return answer(settings, listener, lambda on_fatal: make_app(served, on_fatal, then, message))


if __name__ == "__main__":
    sys.exit(main())
