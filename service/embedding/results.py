"""The result of a request, and the metrics that are written from it."""

from __future__ import annotations

from collections.abc import Sequence

from service.batching.contract import Computed
from service.embedding.instructions import Source
from service.embedding.requests import EmbedResult, Timings
from service.embedding.rows import EmbedRow, Vector
from service.metrics import Metrics


def result_of(
    rows: Sequence[EmbedRow], computed: Sequence[Computed[Vector]], truncated_inputs: int, tokenize_seconds: float
) -> EmbedResult:
    """The rows' vectors and the cost of all of them together."""
    queue = max(item.queue_seconds for item in computed)
    inference = max(item.inference_seconds for item in computed)
    return EmbedResult(
        [item.vector for item in computed],
        sum(map(len, rows)),
        truncated_inputs,
        Timings(tokenize_seconds, queue, inference),
    )


def record(metrics: Metrics, sources: Sequence[Source], rows: Sequence[EmbedRow], result: EmbedResult) -> None:
    """Count a request's inputs, the sources of their instructions, and the tokens of its rows."""
    pooled = sum(len(row) - row.text.span_start for row in rows)
    metrics.inputs.inc(len(sources))
    if result.truncated_inputs:
        metrics.truncated_inputs.inc(result.truncated_inputs)
    metrics.text_tokens.inc(pooled)
    metrics.instruction_tokens.inc(result.prompt_tokens - pooled)
    for source in set(sources):
        metrics.instruction_inputs.labels(source).inc(sources.count(source))
    metrics.request_inputs.observe(len(sources))
    metrics.tokenize_seconds.observe(result.timings.tokenize_seconds)
    for row in rows:
        metrics.input_tokens.observe(len(row))
