"""Step 7: the server with 1.3B over HTTP, and the engine by itself with the batches that the server chose."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.gpu.clocks import packed_batches, pipelined
from bench.gpu.inputs import SHAPES, Shape, random_encoder, store
from bench.gpu.report import Report, lacks_packages
from bench.gpu.start import NEEDS
from bench.texts import mixed_texts
from model_store.encoder.encoder import Encoder
from model_store.encoder.pipeline import Pipeline

_SERVER_NEEDS = f"{NEEDS} fastapi opentelemetry uvicorn httptools pybase64 uvloop"


def measure(report: Report, encoder: Encoder | None) -> None:
    """`encoder` is that of 1.3B, for the engine by itself."""
    lacks = lacks_packages(_SERVER_NEEDS) or ("" if encoder else "1.3B build")
    found = report.step("1.3B over HTTP", 110, lambda: over_http(report, encoder), lacks)
    if found:
        report.target("1.3B, HTTP / engine rate", found["http / engine"], at_least=0.95)


def over_http(report: Report, encoder: Any) -> dict[str, Any]:
    """Bulk, queries and both over HTTP, then the engine."""
    from bench.client import Answers, ask, percentiles, requests_of
    from bench.texts import distinct_texts
    from model_store.text.tokenizer import TextTokenizer

    seconds, inputs, queries = (1.0, 16, 8) if report.tiny else (5.0, 64, 64)
    shape = SHAPES[report.shapes]["1.3B"]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(2, context) as clients:
        clients.map(time.sleep, (0.2, 0.2))  # both processes start beside the server's
        # Everything about the stored encoder is real but its weights.
        folder, width = Path(scratch) / "encoder", shape[1]["hidden_size"]
        sizes = {"max_positions": 8192, "vocabulary": shape[1]["vocab_size"], "width": width}
        manifest = store(SHAPES["tiny"]["1.3B"], folder).model_copy(update=sizes)
        log = Path(scratch) / "log"
        log.touch()
        process = context.Process(
            target=server_process, args=(shape, report.device, folder, manifest, report.compile, report.tiny, log)
        )
        process.start()
        # No two alike: the server computes equal texts that wait together only once.
        count = 1024 if report.tiny else 8192
        distinct = [f"{number} {text}" for number, text in enumerate(mixed_texts(count))]
        texts = {"bulk": distinct, "query": distinct_texts(count)}
        rows = TextTokenizer.load(folder, manifest).encode_batch(distinct, [""] * count)
        mean_tokens = sum(map(len, rows)) / count

        def latencies(answers: Answers) -> dict[str, float]:
            return {"requests": len(answers.answers), **percentiles(answers.latencies, digits=3)}

        def asked(kind: str, inputs: int, connections: int) -> Future[Answers]:
            requests = requests_of(texts[kind], inputs, manifest.name)
            return clients.submit(ask, f"http://127.0.0.1:{port}", requests, connections, seconds)

        try:
            port = wait_for(log, "listening", process, report.seconds_left)["port"]
            found: dict[str, Any] = {"ready": wait_for(log, "ready", process, report.seconds_left)}
            calibrated = found["calibrated"] = wait_for(log, "calibrated", process, 1.0)
            found["switches"] = [line for line in log.read_text().splitlines() if " is o" in line]
            asked("query", 1, 4).result()
            bulk = asked("bulk", inputs, 16).result()
            rate = len(bulk.answers) * inputs * mean_tokens / bulk.seconds
            found[f"bulk {inputs} × 16"] = {"tokens_per_second": round(rate), **latencies(bulk)}
            lone = asked("query", 1, queries).result()
            per_second = round(len(lone.answers) / lone.seconds)
            found[f"queries × {queries}"] = {"per_second": per_second, **latencies(lone)}
            beside = asked("bulk", inputs, 16)
            found["queries × 16 beside bulk"] = latencies(asked("query", 1, 16).result())
            beside.result()
        except BaseException as error:
            error.add_note(f"the server's log ends:\n{log.read_text()[-3000:]}")
            raise
        finally:
            process.terminate()
            process.join(30)
            process.kill()
    alone = rows[: 64 if report.tiny else 1024]
    batches = packed_batches(alone, calibrated["batch_tokens"])
    engine = sum(map(len, alone)) / min(pipelined(Pipeline(encoder), batches)[0] for _ in range(3))
    return {**found, "engine_tokens_per_second": round(engine), "http / engine": round(rate / engine, 3)}


def server_process(
    shape: Shape, device: torch.device, folder: Path, manifest: Any, compiled: bool, tiny: bool, log: Path
) -> None:
    """The real server and its real worker, but for where the encoder comes from."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    import service.device.worker
    import service.server.process
    import service.server.startup
    from service.settings import Settings

    if device.type == "cpu":
        torch.set_num_threads(1)
    vars(service.device.worker)["Encoder"] = SimpleNamespace(load=lambda *_: random_encoder(shape, device))
    service.server.startup.prepare_store = lambda settings, progress: (folder, manifest)
    settings = Settings(
        model=str(folder),
        port=0,
        device=str(device),
        compile="auto" if compiled else "off",
        cuda_graphs="off" if tiny else "auto",  # step 1 tries them, and to capture tiny shapes on a CPU takes minutes
        max_tokens_per_request=1 << 20,
        max_queued_tokens=1 << 23,
    )
    sys.exit(service.server.process.serve(settings, lambda done, total: None))


def wait_for(log: Path, message: str, process: Any, seconds: float) -> dict[str, Any]:
    """The first line with a message in a log of JSON lines."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_alive():
        lines = [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        if found := next((line for line in lines if line.get("message") == message), None):
            return dict(found)
        time.sleep(0.1)
    raise TimeoutError(f"the server did not say {message!r}")
