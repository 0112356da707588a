"""Part 3: the same over HTTP, and queries beside bulk."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.gpu.clocks import ms, packed_batches, pipelined
from bench.gpu.inputs import SHAPES, Shape, random_encoder, trained_tokenizer
from bench.gpu.report import Report
from bench.texts import mixed_texts
from model_store.devices import choose_device
from model_store.pipeline import Pipeline
from model_store.self_test import compile_checked


def measure(report: Report) -> None:
    """Each shape in a server of its own."""
    needed = (
        "fastapi opentelemetry uvicorn pydantic pydantic_settings prometheus_client orjson httptools pybase64 uvloop"
    )
    missing = ", ".join(name for name in needed.split() if importlib.util.find_spec(name) is None)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "bench-gpu-compiled"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    names = list(SHAPES[report.shapes])
    for name in (names[1], names[0], *names[2:])[: 1 if report.shapes == "tiny" else None]:
        report.step(f"{name} over HTTP", 150, partial(serve_one, report, SHAPES[report.shapes][name]), missing)


def serve_one(report: Report, shape: Shape) -> dict[str, Any]:
    """Bulk, queries and both over HTTP, then the engine alone with the batches that the server chose."""
    from bench.http_path import Case, distinct_texts, request_bytes
    from model_store.tokenizer import TextTokenizer
    from tests.tiny import build_tiny

    tiny = report.shapes == "tiny"
    seconds, most = (1.0, 256) if tiny else (8.0, 2048)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(2, context) as clients:
        folder, width = Path(scratch) / "encoder", shape[1]["hidden_size"]
        # Everything about it is real but its weights.
        limits = {"max_positions": 8192, "vocabulary": shape[1]["vocab_size"], "width": width}
        manifest = build_tiny(folder).model_copy(update=limits)
        trained_tokenizer().save(str(folder / "tokenizer.json"))
        tokenizer = TextTokenizer.load(folder, manifest)
        # No two alike: the server computes equal ones that wait together only once.
        distinct = [f"{number} {text}" for number, text in enumerate(mixed_texts(4 * most))]
        texts = {"mixed": distinct, "query": distinct_texts(4 * most)}
        rows = {name: tokenizer.encode_batch(found, [""] * len(found)) for name, found in texts.items()}
        mean_tokens = {name: sum(map(len, found)) / len(found) for name, found in rows.items()}
        log = Path(scratch) / "log"
        log.touch()
        arguments = (shape, str(report.device), folder, manifest, report.compile, log)
        process = context.Process(target=server_process, args=arguments)
        process.start()
        try:
            port = wait_for(log, "listening", process)["port"]
            ready = wait_for(log, "ready", process)

            def ask(kind: str, inputs: int, connections: int) -> Any:
                requests = request_bytes(Case(width, "base64", inputs), texts[kind], manifest.name)
                return clients.submit(load_process, port, requests, connections, seconds)

            def bulk(inputs: int, connections: int) -> dict[str, float]:
                latencies, took = ask("mixed", inputs, connections).result()
                rate = len(latencies) * inputs * mean_tokens["mixed"] / took
                return {"tokens_per_second": round(rate), **quantiles(latencies)}

            list(clients.map(time.sleep, (0.2, 0.2)))  # both processes are there then
            ask("query", 1, 4).result()
            found: dict[str, Any] = {"ready": ready, "calibrated": wait_for(log, "calibrated", process)}
            found["switches"] = [line for line in log.read_text().splitlines() if " is o" in line]
            found |= {"bulk 64 × 16": bulk(64, 16), f"bulk {most} × 3": bulk(most, 3)}
            for connections in (4, 8) if tiny else (16, 64, 256):
                latencies, took = ask("query", 1, connections).result()
                found[f"queries × {connections}"] = {
                    "per_second": round(len(latencies) / took),
                    "tokens_per_second": round(len(latencies) * mean_tokens["query"] / took),
                    **quantiles(latencies),
                }
            beside = ask("mixed", most, 3)
            found["queries × 16 beside bulk"] = quantiles(ask("query", 1, 16).result()[0])
            beside.result()
        except BaseException as error:
            error.add_note(f"the server's log ends:\n{log.read_text()[-3000:]}")
            raise
        finally:
            process.terminate()
            process.join(30)
            process.kill()
    encoder = random_encoder(shape, report.device)
    if report.compile:
        compile_checked(encoder)
    alone = rows["mixed"][: most // 2]
    batches = packed_batches(alone, found["calibrated"]["batch_tokens"])
    pipelined(Pipeline(encoder), batches)
    took = min(pipelined(Pipeline(encoder), batches)[0] for _ in range(2))
    engine = sum(map(len, alone)) / took
    best = max(figures["tokens_per_second"] for name, figures in found.items() if name.startswith("bulk"))
    return {**found, "engine_tokens_per_second": round(engine), "http / engine": round(best / engine, 3)}


def quantiles(latencies: Sequence[float]) -> dict[str, float]:
    """Of so many requests."""
    median, slow = np.percentile(latencies, (50, 99))
    return {"requests": len(latencies), "p50_ms": ms(median), "p99_ms": ms(slow)}


def server_process(shape: Shape, device: str, folder: Path, manifest: Any, compiled: bool, log: Path) -> None:
    """The real server and its real worker, but for where the encoder comes from."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    import service.server
    import service.worker
    from service.settings import Settings

    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    made = SimpleNamespace(load=lambda *_: random_encoder(shape, choose_device(device)))
    vars(service.worker)["Encoder"] = made
    service.server.prepare_store = lambda settings, progress: (folder, manifest)
    settings = Settings(
        model=str(folder),
        port=0,
        device=device,
        compile="auto" if compiled else "off",
        max_tokens_per_request=1 << 20,
        max_queued_tokens=1 << 23,
    )
    sys.exit(service.server.serve(settings, lambda done, total: None))


def wait_for(log: Path, message: str, process: Any, seconds: float = 180.0) -> dict[str, Any]:
    """The first line with a message in a log of JSON lines."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_alive():
        lines = [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        if found := next((line for line in lines if line.get("message") == message), None):
            return dict(found)
        time.sleep(0.1)
    raise TimeoutError(f"the server did not say {message!r}")


def load_process(port: int, requests: list[bytes], connections: int, seconds: float) -> tuple[list[float], float]:
    """Clients in closed loop: their latencies, and how long they took in all."""
    import uvloop

    from bench.http_path import load

    done = uvloop.run(load(port, requests, connections, seconds))
    return done.latencies, done.seconds
