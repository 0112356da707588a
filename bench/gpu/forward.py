"""Steps 2 to 4 and 6: batches by their tokens, a lone query, kernels by their time, and other ways to the same."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from bench.gpu.clocks import best_product, device_seconds, fp8_product, full_width, launch_seconds, ms, pipelined
from bench.gpu.inputs import SHAPES, Row, random_encoder, rows_of, trained_tokenizer
from bench.gpu.report import Report
from bench.texts import mixed_texts, packed_batches
from model_store.build.self_test import compile_checked, largest_difference
from model_store.encoder.attention import implementation_name
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch, to_device
from model_store.encoder.pipeline import Pipeline, finish_of, forward, graph_sizes
from model_store.encoder.pooling import pool
from model_store.encoder.quantization import Quantization
from model_store.shape import Shape

# B texts, D width

# Tokens → way (graph, plain, eager) → figures
Table = dict[str, dict[str, dict[str, float]]]

# Tokens of the batches that a model is measured with.
_SIZES = {
    "8B": [16, 256, 1024, 1100, 2048, 8192],
    "1.3B": [16, 256, 1024, 1100, 2048, 8192],
    "270M": [16, 2048, 4096, 8192],
}
_MOST_CAPTURED = 4096
_LONE_ROUNDS = 200
_TEXT_TOKENS = 128
_TABLE_ROWS = 25
_PROFILED_ROUNDS = 3


def measure(report: Report, name: str) -> Encoder | None:
    """Steps 2 to 4: a model and its encoder, if it can be made."""
    sizes = [16, 64] if report.tiny else _SIZES[name]
    pipeline = ready(report, name, sizes)
    if pipeline is None:
        return None
    table = report.step(f"{name} by tokens", 30, lambda: by_tokens(pipeline, report.bf16_flops, sizes))
    if table and name == "8B":
        share = best(table, sizes[-1], "of_ceiling", max)
        report.target(f"8B at {sizes[-1]}, of the matmul rate", share, at_least=0.76)
    if table and name == "1.3B" and "graph" in table["16"]:
        captured, eager = (table["16"][way]["wall_ms"] for way in ("graph", "eager"))
        report.target("1.3B at 16, captured / eager time", captured / eager, at_most=0.6)
    if name != "270M":
        lone_and_kernels(report, name, pipeline)
    if name == "1.3B":
        plain, longest = Pipeline(pipeline.encoder), 512 if report.tiny else 8192
        report.step(f"1.3B one text of {longest}", 5, lambda: timed(plain, rows_of([longest]), report.bf16_flops))
    return pipeline.encoder


def measure_rest(report: Report, encoder: Encoder | None) -> None:
    """Step 6; `encoder` is that of 1.3B."""
    report.step("pooling alone", 5, lambda: pooling_ms(report))
    sizes = [16, 64] if report.tiny else [16, 8192]
    merged = report.figures.get("8B by tokens")
    unmerged = report.step("8B unmerged", 45, lambda: other_8b(report, report.bf16_flops, sizes, merged=False))
    if merged and unmerged:
        for tokens in sizes:
            ratio = best(merged, tokens, "wall_ms", min) / best(unmerged, tokens, "wall_ms", min)
            report.target(f"8B at {tokens}, merged / unmerged time", ratio, at_most=1.0)

    def in_fp8() -> Table:
        return other_8b(report, best_product(report, fp8_product), sizes, quantization="fp8")

    fp8 = report.step("8B fp8", 45, in_fp8, report.lacks_cuda)
    if merged and fp8:
        ratio = best(merged, sizes[-1], "wall_ms", min) / best(fp8, sizes[-1], "wall_ms", min)
        report.target(f"8B at {sizes[-1]}, fp8 / bf16 rate", ratio, at_least=1.3)
    padded = partial(against_padded, report, encoder)
    report.step("1.3B padded, sorted", 30, padded, "" if encoder else "1.3B build")


def ready(report: Report, name: str, sizes: Sequence[int]) -> Pipeline | None:
    """An encoder, compiled, and captured for batches of so many tokens; without what can't be had or fails."""
    ways: list[Pipeline] = []

    def build() -> dict[str, int]:
        ways.append(Pipeline(random_encoder(SHAPES[report.shapes][name], report.device)))
        return {"flops_per_token": shape_of(ways[0].encoder).linear_flops_per_token}

    def capture() -> dict[str, int]:
        ways.append(captured_for(ways[0].encoder, sizes))
        return {"graphs": len(ways[-1].replays)}

    if report.step(f"{name} build", 15, build) is None:
        return None
    lacks = "" if report.compile else "--compile"
    report.step(f"{name} compile", 60, lambda: compile_checked(ways[0].encoder), lacks)
    report.step(f"{name} capture", 15, capture, report.lacks_cuda)
    return ways[-1]


def other_8b(
    report: Report, peak: float, sizes: Sequence[int], merged: bool = True, quantization: Quantization = "none"
) -> Table:
    """8B made in another way."""
    encoder = random_encoder(SHAPES[report.shapes]["8B"], report.device, merged=merged, quantization=quantization)
    if report.compile:
        compile_checked(encoder)
    on_cuda = report.device.type == "cuda"
    return by_tokens(captured_for(encoder, sizes) if on_cuda else Pipeline(encoder), peak, sizes, eager=False)


def captured_for(encoder: Encoder, sizes: Sequence[int]) -> Pipeline:
    """With the graphs that batches of so many tokens would be replayed from."""
    steps = graph_sizes(_MOST_CAPTURED)
    wanted = {min(step for step in steps if step >= tokens) for tokens in sizes if tokens <= steps[-1]}
    return Pipeline(encoder).with_graphs(sorted(wanted))


def shape_of(encoder: Encoder) -> Shape:
    """The sizes of its decoder."""
    return Shape.read(encoder.model.config.to_dict())


def by_tokens(pipeline: Pipeline, peak: float, sizes: Sequence[int], eager: bool = True) -> Table:
    """Batches of so many tokens, replayed and not; the smallest and the largest also with layers not compiled."""
    encoder, table = pipeline.encoder, {}
    for tokens in sizes:
        lengths = [_TEXT_TOKENS] * (tokens // _TEXT_TOKENS) + [tokens % _TEXT_TOKENS] * (tokens % _TEXT_TOKENS > 0)
        rows = rows_of(lengths)
        ways = {"plain": timed(Pipeline(encoder), rows, peak)}
        if any(replay.graph.tokens >= tokens for replay in pipeline.replays):
            ways["graph"] = timed(pipeline, rows, peak)
        if eager and tokens in (sizes[0], sizes[-1]):
            with eager_layers(encoder):
                ways["eager"] = timed(Pipeline(encoder), rows, peak)
        table[str(tokens)] = ways
    return table


def timed(pipeline: Pipeline, rows: Sequence[Row], peak: float) -> dict[str, float]:
    """The device's time, the caller's and the host's, the rate and its share of the peak."""
    encoder = pipeline.encoder
    shape = shape_of(encoder)
    batch = PackedBatch.pack(rows, "mean")
    finish = finish_of(full_width(pipeline, rows), [1] * len(rows))
    replay = next((replay for replay in pipeline.replays if replay.serves(batch)), None)
    if replay is not None:
        seconds = device_seconds(partial(replay.graph.replay, batch, finish))
    else:
        placed, finish = encoder.place(batch), to_device(finish, encoder.device)
        seconds = device_seconds(partial(forward, encoder, placed, **finish))
    whole, launched = launch_seconds(pipeline, rows, min(max(int(0.3 / seconds), 3), 50))
    lengths = [len(row) for row in rows]
    flops = shape.linear_flops_per_token * sum(lengths) + shape.attention_flops(lengths)
    return {
        "device_ms": ms(seconds),
        "wall_ms": ms(median(whole)),
        "host_ms": ms(median(launched)),
        "tokens_per_second": round(sum(lengths) / seconds),
        "of_ceiling": float(f"{flops / seconds / peak:.3g}"),
    }


def best(table: Table, tokens: int, figure: str, choose: Any) -> float:
    """A figure of the best of the ways that the server may take."""
    ways = table[str(tokens)]
    return float(choose(ways[way][figure] for way in ("graph", "plain") if way in ways))


def lone_and_kernels(report: Report, name: str, pipeline: Pipeline) -> None:
    """A query of 16 tokens with nothing beside it, many times; then where the device's time goes."""

    def lone() -> dict[str, float]:
        whole, launched = launch_seconds(pipeline, rows_of([16]), 10 if report.tiny else _LONE_ROUNDS)
        floor = 2 * shape_of(pipeline.encoder).linear_parameters / report.bytes_per_second
        return {
            "p50_ms": ms(median(whole)),
            "p99_ms": ms(float(np.percentile(whole, 99))),
            "host_ms": ms(median(launched)),
            "floor_ms": ms(floor),
            "to_floor": float(f"{median(whole) / floor:.3g}"),
        }

    found = report.step(f"{name} lone", 5, lone)
    if found and name == "8B":
        report.target("8B lone query, of the time to read the weights", found["to_floor"], at_most=1.35)
    for tokens in (16, 64) if report.tiny else (16, 2048):
        report.step(f"{name} kernels at {tokens}", 10, partial(kernel_table, Pipeline(pipeline.encoder), tokens))


def kernel_table(pipeline: Pipeline, tokens: int) -> dict[str, Any]:
    """The kernels that take the most of a batch's time on the device, or the operations on a CPU."""
    length = min(tokens, _TEXT_TOKENS)
    rows = rows_of([length] * (tokens // length))
    pipelined(pipeline, [rows])
    # On a GPU that a test has made up there is CPU alone to be profiled.
    activities = torch.profiler.supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_PROFILED_ROUNDS):
            pipelined(pipeline, [rows])
    events = profile.key_averages()
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    microseconds = attrgetter("self_device_time_total" if kernels else "self_cpu_time_total")
    by_time = sorted(kernels or events, key=microseconds, reverse=True)
    total = sum(map(microseconds, by_time))
    return {
        "microseconds": round(total / _PROFILED_ROUNDS, 1),
        "top": [
            {
                "name": event.key[:120],
                "calls": round(event.count / _PROFILED_ROUNDS, 1),
                "microseconds": round(microseconds(event) / _PROFILED_ROUNDS, 1),
                "share": round(microseconds(event) / total, 4) if total else 0.0,
            }
            for event in by_time[:_TABLE_ROWS]
        ],
    }


def pooling_ms(report: Report) -> dict[str, float]:
    """Pooling of as many tokens in one text and in many, as wide as 270M."""
    width, tokens = SHAPES[report.shapes]["270M"][1]["hidden_size"], 512 if report.tiny else 8192
    hidden = torch.randn(tokens, width, device=report.device, dtype=torch.bfloat16)
    found = {}
    for length in (tokens, _TEXT_TOKENS):
        batch = PackedBatch.pack(rows_of([length] * (tokens // length)), "mean")
        placed = PackedBatch(longest=length, **to_device(batch.tensors, report.device))
        found[f"texts of {length}"] = ms(device_seconds(partial(pool, hidden, placed)))
    return found


@contextmanager
def eager_layers(encoder: Encoder) -> Iterator[None]:
    """The layers as they were before they were compiled, for a while."""
    compiled = [layer._compiled_call_impl for layer in encoder.model.layers]
    encoder.uncompile_layers()
    try:
        yield
    finally:
        for layer, call in zip(encoder.model.layers, compiled, strict=True):
            layer._compiled_call_impl = call


def against_padded(report: Report, encoder: Any) -> dict[str, Any]:
    """Packed batches in the order of the texts, against padded ones of 32, sorted by length, through torch's SDPA."""
    texts = mixed_texts(8 if report.tiny else 512)
    rows = [Row(encoding.ids, 0) for encoding in trained_tokenizer().encode_batch(texts)]
    tokens = sum(map(len, rows))
    batches = packed_batches(rows, 512 if report.tiny else 8192)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    by_length = [rows[index] for index in order]
    times: dict[str, list[float]] = {"packed": [], "padded": []}
    for _ in range(3):  # the first warms up
        seconds, packed = pipelined(Pipeline(encoder), batches)
        times["packed"].append(seconds)
        with eager_layers(encoder):
            seconds, padded = padded_vectors(encoder, by_length)
        times["padded"].append(seconds)
    rates = {name: tokens / min(each[1:]) for name, each in times.items()}
    return {
        "texts": len(rows),
        "tokens": tokens,
        "tokens_per_second": rates,
        "packed / padded": round(rates["packed"] / rates["padded"], 2),
        # Random weights: the rounding of as many layers as the model has, with nothing that was learned to dampen it.
        "largest 1 - cosine": largest_difference(packed[order], padded),
    }


@torch.inference_mode()
def padded_vectors(encoder: Encoder, rows: Sequence[Row]) -> tuple[float, Tensor]:
    """Seconds, and (B, D) by way of transformers' own attention, in batches of 32 rows, padded to their longest."""
    began, found = time.perf_counter(), []
    encoder.model.set_attn_implementation("sdpa")
    try:
        for start in range(0, len(rows), 32):
            parts = [torch.tensor(row.token_ids) for row in rows[start : start + 32]]
            ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(encoder.device)
            lengths = torch.tensor([len(part) for part in parts], device=encoder.device)
            mask = (torch.arange(ids.shape[1], device=encoder.device) < lengths[:, None]).long()
            output = encoder.model(input_ids=ids, attention_mask=mask, is_causal=False, use_cache=False)
            sums = (output.last_hidden_state * mask[..., None]).sum(1).float()
            found.append(torch.nn.functional.normalize(sums).cpu())
    finally:
        encoder.model.set_attn_implementation(implementation_name(encoder.kernel))
    return time.perf_counter() - began, torch.cat(found)
