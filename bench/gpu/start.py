"""Step 1: the worker as the server starts it, from a stored folder, with every fast path demanded."""

from __future__ import annotations

import asyncio
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu.inputs import SHAPES, rows_of, store
from bench.gpu.report import Report, lacks_packages
from model_store.build.self_test import largest_difference
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch

NEEDS = "pydantic pydantic_settings prometheus_client orjson"

_LENGTHS = [3, 40, 17, 300]

# Few graphs, where tiny shapes only try whether all of it runs.
_TINY_TOKENS = 64


def workers(report: Report) -> None:
    """A Llama and a Gemma 3, which has two kinds of layers and windows."""
    missing = lacks_packages(NEEDS)
    for name in ("1.3B", "270M"):
        run = partial(start_worker, report, name)
        report.step(f"worker {SHAPES['tiny'][name][0]}", 90, run, missing)


def start_worker(report: Report, name: str) -> dict[str, Any]:
    """Start, embed a batch, compare it with the CPU."""
    from service.batching.limits import Limits
    from service.device.worker import EncoderWorker
    from service.embedding.rows import EmbedRow
    from service.metrics import Metrics
    from service.settings import Settings

    on_cuda = report.device.type == "cuda"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "encoder"
        manifest = store(SHAPES["tiny"][name], folder)
        settings = Settings(
            model=str(folder),
            device="auto" if on_cuda else "cpu",
            compile="on" if report.compile else "off",
            cuda_graphs="on" if on_cuda else "off",
            token_budget=_TINY_TOKENS if report.shapes == "tiny" else None,
            max_input_tokens=_TINY_TOKENS if report.shapes == "tiny" else None,
        )
        worker = EncoderWorker(folder, settings, Metrics())
        rows = rows_of(_LENGTHS)

        async def embedded() -> tuple[Any, Any]:
            plan = await worker.start(Limits(settings, manifest, report.device.type))
            return plan, await worker.run_batch([EmbedRow(row, manifest.width) for row in rows])

        try:
            plan, vectors = asyncio.run(embedded())
        finally:
            worker.stop()
        expected = Encoder.load(folder, "cpu", "float32").encode(PackedBatch.pack(rows, "mean"))
    found = torch.stack([torch.as_tensor(vector) for vector in vectors])
    report.check(f"worker {manifest.model_type} against the CPU", largest_difference(found, expected), 1e-2)
    about = {"device": worker.device, "dtype": worker.dtype, "kernel": worker.kernel}
    return {**about, "batch_tokens": plan.limits.batch_tokens, "tokens_per_second": round(plan.cost.tokens_per_second)}
