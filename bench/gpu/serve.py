"""Step 5: the server with 1.3B over HTTP, and the engine by itself with the batches that the server chose."""

from __future__ import annotations

import importlib.util
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu.forward import pipelined
from bench.gpu.inputs import SHAPES, random_model, store
from bench.gpu.report import Report
from bench.texts import distinct_texts, mixed_texts, packed_batches, tokenized
from model_store.encoder.encoder import Encoder
from model_store.encoder.pipeline import Pipeline

if TYPE_CHECKING:
    from concurrent.futures import Future

    from bench.client import Answers

_NEEDS = ["pydantic", "pydantic_settings", "prometheus_client", "orjson", "fastapi", "opentelemetry", "uvicorn"]
_NEEDS += ["httptools", "pybase64", "uvloop"]


def measure(report: Report, encoder: Encoder | None) -> None:
    """`encoder` is that of 1.3B, for the engine by itself."""
    lacks = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if encoder is None:
        lacks.append("1.3B build")
    found = report.step("1.3B over HTTP", 140, lambda: over_http(report, encoder), ", ".join(lacks))
    if found:
        report.target("1.3B, HTTP / engine rate", found["http / engine"], at_least=0.95)


def over_http(report: Report, encoder: Any) -> dict[str, Any]:
    """Bulk, queries and both over HTTP, then the engine."""
    from bench.client import ask, percentiles, requests_of
    from bench.server import serving

    seconds, inputs, queries = (1.0, 16, 8) if report.tiny else (5.0, 64, 64)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(2, context) as clients:
        clients.map(time.sleep, (0.2, 0.2))  # both processes start beside the server's
        folder = Path(scratch) / "encoder"
        manifest = store(random_model(SHAPES[report.shapes]["1.3B"], report.device), folder)
        # No two alike: the server computes equal texts that wait together only once.
        count = 1024 if report.tiny else 8192
        distinct = [f"{number} {text}" for number, text in enumerate(mixed_texts(count))]
        texts = {"bulk": distinct, "query": distinct_texts(count)}
        rows = tokenized(distinct, folder)
        mean_tokens = sum(map(len, rows)) / count

        def asked(kind: str, inputs: int, connections: int) -> Future[Answers]:
            requests = requests_of(texts[kind], inputs, manifest.name)
            return clients.submit(ask, server.url, requests, connections, seconds)

        def latencies(answers: Answers) -> dict[str, float]:
            return {"requests": len(answers.answers), **percentiles(answers.latencies, digits=3)}

        settings = {
            "LLM2VEC_DEVICE": report.device.type,
            "LLM2VEC_CUDA_GRAPHS": "off" if report.tiny else "auto",  # to capture tiny shapes on a CPU takes minutes
            "LLM2VEC_MAX_TOKENS_PER_REQUEST": 1 << 20,
            "LLM2VEC_MAX_QUEUED_TOKENS": 1 << 23,
        }
        with serving(folder, settings, seconds=report.seconds_left) as server:
            (ready,), (calibrated,) = server.said("ready"), server.said("calibrated")
            found: dict[str, Any] = {"ready": ready, "calibrated": calibrated}
            found["switches"] = [line for line in server.log.read_text().splitlines() if " is o" in line]
            asked("query", 1, 4).result()
            bulk = asked("bulk", inputs, 16).result()
            rate = bulk.per_second * inputs * mean_tokens
            found[f"bulk {inputs} × 16"] = {"tokens_per_second": round(rate), **latencies(bulk)}
            lone = asked("query", 1, queries).result()
            found[f"queries × {queries}"] = {"per_second": round(lone.per_second), **latencies(lone)}
            beside = asked("bulk", inputs, 16)
            found["queries × 16 beside bulk"] = latencies(asked("query", 1, 16).result())
            beside.result()
    alone = rows[: 64 if report.tiny else 1024]
    batches = packed_batches(alone, calibrated["batch_tokens"])
    engine = sum(map(len, alone)) / min(pipelined(Pipeline(encoder), batches)[0] for _ in range(3))
    return {**found, "engine_tokens_per_second": round(engine), "http / engine": round(rate / engine, 3)}
