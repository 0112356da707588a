"""Steps 1 to 4 and 6: what the device can do, batches by their tokens, kernels by their time, and other ways."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from bench.gpu.inputs import SHAPES, random_encoder, rows_of
from bench.gpu.report import Report
from bench.report import seconds_of
from model_store.build.self_test import compile_checked
from model_store.encoder.encoder import Encoder
from model_store.encoder.pipeline import Pipeline, graph_sizes
from model_store.encoder.pooling import Wanted
from model_store.encoder.roofline import gemm_flops_per_second
from model_store.shape import Shape
from model_store.text.tokenizer import TokenizedText

Rows = Sequence[TokenizedText]

# Tokens → way (graph, plain) → figures
Table = dict[str, dict[str, dict[str, float]]]

# Tokens of the batches that a model is measured with.
_SIZES = {
    "8B": [16, 256, 1024, 1100, 2048, 8192],
    "1.3B": [16, 256, 1024, 1100, 2048, 8192],
    "270M": [16, 2048, 4096, 8192],
}
_MOST_CAPTURED = 4096
_TEXT_TOKENS = 128
_TABLE_ROWS = 25
_PROFILED_ROUNDS = 3


def ceilings(report: Report) -> None:
    """Step 1: what the device can do at most, in products of large matrices and in copies."""

    def product() -> dict[str, float]:
        report.bf16_flops = float(f"{gemm_flops_per_second(report.device, torch.bfloat16):.4g}")
        return {"bf16_flops": report.bf16_flops}

    def copy() -> dict[str, float]:
        source = torch.ones((1 << 22) if report.tiny else (1 << 32), dtype=torch.uint8, device=report.device)
        target = torch.empty_like(source)

        def copied() -> None:
            target.copy_(source)
            target[:1].cpu()  # waits for the device

        seconds = min(seconds_of(copied) for _ in range(10))
        report.bytes_per_second = float(f"{2 * source.numel() / seconds:.4g}")
        return {"bytes_per_second": report.bytes_per_second}

    report.step("ceiling bf16", 10, product)
    report.step("ceiling copy", 10, copy)


def measure(report: Report, name: str) -> Encoder | None:
    """Steps 2 to 4: a model and its encoder, if it can be made."""
    sizes = [16, 64] if report.tiny else _SIZES[name]
    pipeline, table = by_tokens(report, name, sizes)
    if pipeline is None:
        return None
    if table and name == "8B":
        share = max(figures["of_ceiling"] for figures in table[str(sizes[-1])].values())
        report.target(f"8B at {sizes[-1]}, of the matmul rate", share, at_least=0.76)
        floor = 2000 * shape_of(pipeline).linear_parameters / report.bytes_per_second
        report.target("8B lone query, of the time to read the weights", least_ms(table, 16) / floor, at_most=1.35)
    eager = report.figures.get("1.3B eager")
    if table and eager and name == "1.3B" and "graph" in table["16"]:
        report.target(
            "1.3B at 16, captured / eager time",
            table["16"]["graph"]["wall_ms"] / eager["16"]["wall_ms"],
            at_most=0.6,
        )
    if name != "270M":
        for tokens in (16, 64) if report.tiny else (16, 2048):
            report.step(f"{name} kernels at {tokens}", 10, partial(kernel_table, Pipeline(pipeline.encoder), tokens))
    return pipeline.encoder


def measure_rest(report: Report) -> None:
    """Step 6."""
    sizes = [16, 64] if report.tiny else [16, 8192]
    merged = report.figures.get("8B by tokens")
    unmerged = by_tokens(report, "8B", sizes, "unmerged", merged=False)[1]
    if merged and unmerged:
        for tokens in sizes:
            ratio = least_ms(merged, tokens) / least_ms(unmerged, tokens)
            report.target(f"8B at {tokens}, merged / unmerged time", ratio, at_most=1.0)
    fp8 = by_tokens(report, "8B", sizes, "fp8", report.lacks_cuda, quantization="fp8")[1]
    if merged and fp8:
        ratio = least_ms(merged, sizes[-1]) / least_ms(fp8, sizes[-1])
        report.target(f"8B at {sizes[-1]}, fp8 / bf16 rate", ratio, at_least=1.3)


def by_tokens(
    report: Report, name: str, sizes: Sequence[int], variant: str = "", lacks: str = "", **how: Any
) -> tuple[Pipeline | None, Table]:
    """An encoder, compiled, and captured for batches of so many tokens, as far as that is to be had; and its figures.

    The smallest and the largest batch are also measured with layers that are not compiled.
    """
    label = f"{name} {variant}".strip()
    ways: list[Pipeline] = []

    def build() -> dict[str, int]:
        ways.append(Pipeline(random_encoder(SHAPES[report.shapes][name], report.device, **how)))
        return {"flops_per_token": shape_of(ways[0]).linear_flops_per_token}

    def eager() -> dict[str, dict[str, float]]:
        return {str(tokens): timed(ways[0], texts_of(tokens), report.bf16_flops) for tokens in (sizes[0], sizes[-1])}

    def capture() -> dict[str, int]:
        steps = graph_sizes(_MOST_CAPTURED)
        wanted = {min(step for step in steps if step >= tokens) for tokens in sizes if tokens <= steps[-1]}
        ways.append(ways[0].with_graphs(sorted(wanted)))
        return {"graphs": len(ways[-1].replays)}

    def table() -> Table:
        found: Table = {}
        for tokens in sizes:
            pipelines = {"plain": ways[0]}
            if any(replay.graph.tokens >= tokens for replay in ways[-1].replays):
                pipelines["graph"] = ways[-1]
            found[str(tokens)] = {
                way: timed(pipeline, texts_of(tokens), report.bf16_flops) for way, pipeline in pipelines.items()
            }
        return found

    if report.step(f"{label} build", 15, build, lacks) is None:
        return None, {}
    report.step(f"{label} eager", 5, eager)
    report.step(f"{label} compile", 60, lambda: compile_checked(ways[0].encoder), report.lacks_cuda)
    report.step(f"{label} capture", 15, capture, report.lacks_cuda)
    return ways[-1], report.step(f"{label} by tokens", 30, table) or {}


def texts_of(tokens: int) -> list[TokenizedText]:
    """So many tokens, in texts of a usual length and one with the rest."""
    whole, rest = divmod(tokens, _TEXT_TOKENS)
    return rows_of([_TEXT_TOKENS] * whole + [rest] * (rest > 0))


def least_ms(table: Table, tokens: int) -> float:
    """Milliseconds of the better of the ways that the server may take."""
    return min(figures["wall_ms"] for figures in table[str(tokens)].values())


def kernel_table(pipeline: Pipeline, tokens: int) -> list[str]:
    """torch's table of the kernels that take the most of some batches' time, or of the operations on a CPU."""
    batches = [texts_of(tokens)] * _PROFILED_ROUNDS
    pipelined(pipeline, batches)
    # On a GPU that a test has made up there is CPU alone to be profiled.
    activities = torch.profiler.supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    with torch.profiler.profile(activities=activities) as profile:
        pipelined(pipeline, batches)
    by = "self_cuda_time_total" if ProfilerActivity.CUDA in activities else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=by, row_limit=_TABLE_ROWS).splitlines()  # type: ignore[no-any-return]


def one_by_one(pipeline: Pipeline, rows: Rows, rounds: int) -> tuple[list[float], list[float]]:
    """Times until vectors are there, and until `launch` returns, one batch at a time."""
    whole, launched = [], []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        pending = pipeline.launch(rows, full_width(pipeline, rows))
        launched.append(time.perf_counter() - began)
        pending.wait()
        whole.append(time.perf_counter() - began)
    return whole[2:], launched[2:]


def pipelined(pipeline: Pipeline, batches: Sequence[Rows]) -> tuple[float, Tensor]:
    """Seconds for all batches, each queued before the one before it is awaited, and their (B, D) vectors."""
    began, found, before = time.perf_counter(), [], None
    for batch in [*batches, None]:
        pending = pipeline.launch(batch, full_width(pipeline, batch)) if batch else None
        if before is not None:
            found.append(before.wait())
        before = pending
    return time.perf_counter() - began, torch.from_numpy(np.concatenate(found))


def timed(pipeline: Pipeline, rows: Rows, peak: float) -> dict[str, float]:
    """The time of a batch among others, of one alone and of the host; the rate, and its share of the bfloat16 peak."""
    rounds = min(max(int(0.3 / min(one_by_one(pipeline, rows, 1)[0])), 3), 50)
    whole, launched = one_by_one(pipeline, rows, rounds)
    seconds = pipelined(pipeline, [rows] * rounds)[0] / rounds
    shape, lengths = shape_of(pipeline), [len(row) for row in rows]
    flops = shape.linear_flops_per_token * sum(lengths) + shape.attention_flops(lengths)
    return {
        "device_ms": ms(seconds),
        "wall_ms": ms(median(whole)),
        "host_ms": ms(median(launched)),
        "tokens_per_second": round(sum(lengths) / seconds),
        "of_ceiling": float(f"{flops / seconds / peak:.3g}"),
    }


def full_width(pipeline: Pipeline, rows: Rows) -> list[Wanted]:
    """Whole vectors for each of the rows."""
    return [Wanted(pipeline.encoder.manifest.width)] * len(rows)


def shape_of(pipeline: Pipeline) -> Shape:
    """The sizes of its decoder."""
    return Shape.read(pipeline.encoder.model.config.to_dict())


def ms(seconds: float) -> float:
    """Milliseconds for people."""
    return float(f"{seconds * 1000:.4g}")
