"""Traces of requests, where the extra is installed."""

from __future__ import annotations

from typing import Any

import pytest

from service.tracing import Traces, start_traces
from tests.service.fakes import Server

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="the extra otel is not installed")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_nothing_is_traced_without_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert start_traces() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    traces = start_traces()
    assert traces
    traces.close()


def test_a_request_and_its_steps_under_the_caller_s_trace() -> None:
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    server = Server(traces=Traces(provider), api_keys="sk-secret")
    with server.client:
        answer = server.embed({"traceparent": PARENT, "x-api-key": "sk-secret"}, input="tangerine")
        server.embed(input="tangerine")
        server.embed({"traceparent": "nonsense", "x-api-key": "sk-secret"}, input="")
        spans: list[Any] = list(exporter.get_finished_spans())
    first = [span for span in spans if span.context.trace_id == int(PARENT.split("-")[1], 16)]
    names = [span.name for span in first]
    assert names == ["tokenize", "queue", "inference", "serialize", "POST /v1/embeddings"]
    *steps, request = first
    assert request.parent.span_id == int(PARENT.split("-")[2], 16)
    assert {step.parent.span_id for step in steps} == {request.context.span_id}
    assert request.attributes["llm2vec.request_id"] == answer.headers["x-request-id"]
    assert all(step.start_time <= step.end_time for step in steps)
    assert request.start_time <= steps[0].start_time
    others = [span.attributes.get("error.type") for span in spans if span not in first]
    assert others == ["invalid_api_key", "empty_input"]
    shown = " ".join(span.to_json() for span in spans)
    assert "tangerine" not in shown
    assert "sk-secret" not in shown
