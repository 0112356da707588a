"""OpenTelemetry traces, if the extra `otel` is installed and OpenTelemetry's own variables name an endpoint.

Each request has a span, with one span each for tokenizing, waiting, inference and writing the answer, made from the
request's timings. Spans never hold input text, keys or header values. Without an endpoint there is no cost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from service.logs import log, request_id
from service.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_CARRIED = ("traceparent", "tracestate")
_NAME = "llm2vec-service"


class Traces:
    """Writes spans of requests that have been answered."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer(_NAME)
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def record(
        self,
        headers: Mapping[bytes, bytes],
        method: str,
        route: str,
        status: int,
        code: str,
        steps: Sequence[tuple[str, float]],
        began: float,
        answered: float,
        ended: float,
    ) -> None:
        """Record the spans of one request, under the caller's `traceparent` if it sent one.

        `steps` are names and seconds, in order. If a request took several batches, each step is as long as the longest
        of them. The request came at `began`, its answer began at `answered` and was sent at `ended`, by
        `time.perf_counter`.
        """
        carrier = {name: headers[name.encode()].decode("latin-1") for name in _CARRIED if name.encode() in headers}
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "llm2vec.request_id": request_id.get() or "",
        }
        if code:
            attributes["error.type"] = code
        behind = time.time() - time.perf_counter()

        def unix_nanoseconds(moment: float) -> int:
            return int((moment + behind) * 1e9)

        span = self._tracer.start_span(
            f"{method} {route}",
            context=self._propagator.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=unix_nanoseconds(began),
        )
        if status >= 500:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, code))
        at = began
        parts = []
        for name, seconds in steps:
            parts.append((name, at, at + seconds))
            at += seconds
        if parts:
            parts.append(("serialize", answered, ended))
        own = self._trace.set_span_in_context(span)
        for name, start, end in parts:
            part = self._tracer.start_span(name, context=own, start_time=unix_nanoseconds(start))
            part.end(unix_nanoseconds(end))
        span.end(unix_nanoseconds(ended))

    def close(self) -> None:
        """Send the spans that are left."""
        self._provider.shutdown()


def start_traces() -> Traces | None:
    """Traces to the configured endpoint; None without an endpoint or without the extra."""
    if not any(os.environ.get(name) for name in _ENDPOINTS) or os.environ.get("OTEL_SDK_DISABLED", "") == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("no traces: %s is set, but pip install 'llm2vec-service[otel]' was not run", _ENDPOINTS[0])
        return None
    own = {"service.name": os.environ.get("OTEL_SERVICE_NAME", _NAME), "service.version": VERSION}
    provider = TracerProvider(resource=Resource.create(own))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)
