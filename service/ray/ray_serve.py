"""The server as a deployment of Ray Serve: each replica runs the same application, behind Ray's proxies.

Usage: `import_path: service.ray.ray_serve:application`, with settings as `args`; docker/ray/serve.yaml is a whole
configuration. A replica takes requests once its encoder is warm. The number of replicas follows the tokens that wait. A
replica that can't go on ends, so that Ray starts another. Clients connect to Ray's proxies and not to a replica, so the
server's limits on slow connections have no effect there (docs/ray.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ray import serve

from service.device import watchdog
from service.logs import log
from service.ray.scaling import BUSY, QUEUED_TOKENS
from service.server.process import make_app
from service.server.startup import prepare
from service.settings import load_settings


def application(arguments: dict[str, Any]) -> serve.Application:
    """The application for Ray Serve; see `deployment`."""
    return deployment(arguments).bind()


def deployment(arguments: dict[str, Any]) -> serve.Deployment:
    """The application's deployment; `arguments` are settings, and win over the replicas' LLM2VEC_ variables.

    Raises:
        StartupError: for a setting that does not exist or has a bad value.
    """
    load_settings(arguments)

    def make_app() -> Any:
        return _app(arguments)

    return serve.deployment(name="LLM2Vec", max_ongoing_requests=4096)(serve.ingress(make_app)(Replica))


def _app(arguments: dict[str, Any]) -> Any:
    """The application of one replica, whose lifespan begins with warming up."""
    settings = load_settings(arguments)
    prepared = prepare(settings, lambda done, total: None)
    started: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()

    def on_fatal(error: BaseException) -> None:
        if not started.done():
            started.set_exception(error)
            return
        log.critical("the replica can't go on: %s", error)
        watchdog.end_within(watchdog.GRACE_SECONDS)  # Ray notices the end, and starts another

    app = make_app(prepared, on_fatal, started.set_result)
    serving = app.router.lifespan_context

    @asynccontextmanager
    async def once_ready(app: Any) -> AsyncIterator[None]:
        async with serving(app):
            await started
            yield

    app.router.lifespan_context = once_ready
    return app


class Replica:
    """The methods that Ray calls on a replica beside its application."""

    app: Any  # Ray's subclass of this class has it

    _told: tuple[float, float] = (0.0, 0.0)

    def check_health(self) -> None:
        """Called by Ray every few seconds.

        Raises:
            RuntimeError: if the replica can't compute any more.
        """
        if self.app.state.parts.life.phase == "failed":
            raise RuntimeError("the encoder can't compute any more")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray every few seconds: the tokens that wait, and how busy the device was since the last call."""
        parts = self.app.state.parts
        (family,) = parts.metrics.device_seconds.collect()
        computed = sum(sample.value for sample in family.samples if sample.name.endswith("_total"))
        now = time.monotonic()
        (before, computed_before), self._told = self._told, (now, computed)
        busy = (computed - computed_before) / (now - before) if before else 0.0
        return {QUEUED_TOKENS: float(parts.backend.batcher.queued_tokens), BUSY: min(busy, 1.0)}
