"""Part 1: do the fast paths compute what the slow ones do?"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu.ceilings import ceilings
from bench.gpu.clocks import device_seconds, ms
from bench.gpu.inputs import SHAPES, Row, Shape, gemma3, llama, random_encoder, rows_of
from bench.gpu.report import Report
from model_store.attention import Layout, packed_sdpa, packed_torch_flash
from model_store.packing import PackedBatch, to_device
from model_store.pipeline import Pipeline, graph_sizes
from model_store.pooling import pool
from model_store.quantization import EmulatedFp8Linear, Fp8Linear, emulate_fp8, quantize
from model_store.self_test import TOLERANCE, _padded_vectors, compile_checked, largest_difference

# B texts, H query heads, G key/value heads, d head width, D width

# Small models of every head width, with and without shared keys and windows: only their attention matters.
FAMILIES: dict[str, Shape] = {
    "llama d64": llama(512, 3, 8, 8, 768, 512, initializer_range=0.06),
    "llama d128 shared": llama(1024, 3, 8, 2, 1536, 512, initializer_range=0.04),
    "qwen3 d128 shared": ("qwen3", llama(512, 3, 8, 2, 768, 512, head_dim=128, initializer_range=0.06)[1]),
    "mistral d64 window": ("mistral", llama(512, 3, 8, 2, 768, 512, sliding_window=100, initializer_range=0.06)[1]),
    "gemma3 d256 window": gemma3(640, 7, 256, 1024, 512, sliding_window=100, initializer_range=0.05),
}
LENGTHS = [1, 3, 16, 17, 70, 9, 300, 1013]


def measure(report: Report) -> None:
    """Fast paths against slow ones; what can break the device comes last."""
    device, tiny = report.device, report.shapes == "tiny"
    shape = SHAPES[report.shapes]["1.3B"]
    cuda = report.needs_cuda()
    ceilings(report)
    report.step("flash attention", 20, lambda: flash_attention(report), cuda)
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{family} {str(dtype).removeprefix('torch.')}"
            report.step(name, 5, partial(packed_against_padded, report, name, FAMILIES[family], dtype))
    report.step("alone", 10, lambda: alone_against_among(report, shape))
    report.step("pooling", 10, lambda: pooling_ms(device, [128, 64] if tiny else [8192, 128]))
    report.step("compiled", 90, lambda: compiled_against_eager(report, shape), report.needs_cuda(compiler=True))
    report.step("fp8 layer", 10, lambda: fp8_layer(report), cuda)
    report.step("fp8", 60, lambda: fp8_against_bf16(report, shape))
    for name in SHAPES[report.shapes]:
        run = partial(graphs_against_plain, report, name, SHAPES[report.shapes][name])
        report.step(f"graphs {name}", 30, run, cuda)


def flash_attention(report: Report) -> dict[str, float]:
    """‖out − ref‖ / ‖ref‖ of the varlen kernel, against each text by itself in float32."""
    starts = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    cu_seqlens = torch.from_numpy(starts).to(report.device)
    found = {}
    for width, (heads, groups), window in itertools.product((64, 128, 256), ((8, 8), (8, 2)), (None, 100, 511)):
        shape = (int(starts[-1]), width)
        made = partial(torch.randn, device=report.device, dtype=torch.bfloat16)
        query, key, value = made(1, heads, *shape), made(1, groups, *shape), made(1, groups, *shape)
        layout = Layout(cu_seqlens, max(LENGTHS), width**-0.5, window)
        expected = packed_sdpa(query.float(), key.float(), value.float(), layout)
        error = (packed_torch_flash(query, key, value, layout).float() - expected).norm() / expected.norm()
        name = f"flash d{width} {heads}/{groups} window {window}"
        found[name] = float(f"{error:.3g}")
        report.check(name, float(error), 1e-2)
    return found


def packed_against_padded(report: Report, name: str, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """A whole small model, packed, against transformers' own padded forward."""
    encoder = random_encoder(shape, report.device, dtype)
    rows = rows_of(LENGTHS[:7] if report.shapes == "tiny" else LENGTHS)
    packed = encoder.encode(PackedBatch.pack(rows, "mean"))
    difference = largest_difference(packed, _padded_vectors(encoder, rows))
    report.check(name, difference, 2 * TOLERANCE[dtype])
    return {"kernel": encoder.kernel, "1 - cosine": difference}


def alone_against_among(report: Report, shape: Shape) -> dict[str, Any]:
    """A text's vector does not depend on its batch mates, but for rounding: cuBLAS chooses a kernel by the rows."""
    pipeline = Pipeline(random_encoder(shape, report.device, layers=4))
    others = rows_of([7] * 63 + [512, 200], seed=1)
    found = {}
    for length in (5, 16, 40, 300):
        row = rows_of([length])
        alone, among = vectors_of(pipeline, row)[0], vectors_of(pipeline, [*others, *row])[-1]
        difference = largest_difference(alone[None], among[None])
        found[str(length)] = {"bit_identical": bool((alone == among).all()), "1 - cosine": difference}
        report.check(f"alone {length}", difference, 1e-3)
    return found


def pooling_ms(device: torch.device, lengths: Sequence[int]) -> dict[str, float]:
    """Pooling of as many tokens in one text and in many, 2048 wide."""
    found = {}
    for length in lengths:
        batch = PackedBatch.pack(rows_of([length] * (max(lengths) // length)), "mean")
        batch = replace(batch, **to_device(batch.tensors, device))  # type: ignore[arg-type]
        hidden = torch.randn(max(lengths), 2048, device=device, dtype=torch.bfloat16)
        found[f"texts of {length}"] = ms(device_seconds(partial(pool, hidden, batch), device))
    return found


def compiled_against_eager(report: Report, shape: Shape) -> dict[str, float]:
    """For several batches after one compilation, which must not be made again for them."""
    import torch._dynamo.utils as dynamo

    encoder = random_encoder(shape, report.device, layers=4)
    pipeline, batches = Pipeline(encoder), [rows_of(lengths) for lengths in ([16], [5, 90], LENGTHS[:6], [512, 7] * 4)]
    eager = [vectors_of(pipeline, rows) for rows in batches]
    compile_checked(encoder)
    graphs = dynamo.counters["stats"]["unique_graphs"]
    for rows, before in zip(batches, eager, strict=True):
        name = f"compiled, {len(rows)} texts"
        report.check(name, largest_difference(vectors_of(pipeline, rows), before), 2 * TOLERANCE[torch.bfloat16])
    return {"graphs": graphs, "compiled_again": dynamo.counters["stats"]["unique_graphs"] - graphs}


def fp8_layer(report: Report) -> dict[str, float]:
    """The fp8 kernel against the same numbers multiplied in bfloat16, with and without bias, for odd row counts."""
    found = {}
    for tokens, bias in itertools.product((16, 17, 333), (False, True)):
        linear = torch.nn.Linear(1024, 512, bias=bias, device=report.device, dtype=torch.bfloat16)
        x = torch.randn(1, tokens, 1024, device=report.device, dtype=torch.bfloat16)
        ours, slow = (kind(linear, report.device)(x).float() for kind in (Fp8Linear, EmulatedFp8Linear))
        name = f"fp8 layer, {tokens} tokens{', bias' * bias}"
        found[name] = float((ours - slow).norm() / slow.norm())
        report.check(name, found[name], 2e-2)
    return found


def fp8_against_bf16(report: Report, shape: Shape) -> dict[str, float]:
    """Cosines of vectors of random weights, which are harder than real ones: the kernel's, and its slow twin's."""
    rows = rows_of(LENGTHS[:6])
    found: dict[str, float] = {}
    for name in ("emulated", "kernel")[: 2 if report.device.type == "cuda" else 1]:
        encoder = random_encoder(shape, report.device, layers=4)
        before = vectors_of(Pipeline(encoder), rows)
        emulate_fp8(encoder.model) if name == "emulated" else quantize(encoder.model, "fp8", report.device)
        cosines = torch.cosine_similarity(vectors_of(Pipeline(encoder), rows), before)
        found |= {f"{name} mean": float(cosines.mean()), f"{name} min": float(cosines.min())}
        report.check(f"fp8 {name}", 1 - float(cosines.min()), 0.05)
    return found


def graphs_against_plain(report: Report, name: str, shape: Shape) -> dict[str, Any]:
    """Replays for several batches, one after another, with different widths and numbers of texts."""
    encoder = random_encoder(shape, report.device, layers=min(6, shape[1]["num_hidden_layers"]))
    plain, width = Pipeline(encoder), encoder.manifest.width
    began = time.perf_counter()
    replayed = plain.with_graphs(graph_sizes(2048))
    seconds = time.perf_counter() - began
    for seed, lengths in enumerate(
        ([1], [16], [5, 3, 2], [9, 60, 30], [8] * 30, [17] * 59, [1013, 70], [2048], [2000])
    ):
        rows = rows_of(lengths, seed=seed)
        widths = [width if i % 2 else width // 3 for i in range(len(rows))]
        held = [one.graph.tokens for one in replayed.replays if one.serves(PackedBatch.pack(rows, "mean"))]
        left, right = (torch.from_numpy(way.launch(rows, widths).wait().copy()) for way in (plain, replayed))
        what = f"graphs {name}, {len(rows)} texts of up to {max(lengths)} in {held[0] if held else 'none'}"
        report.check(what, largest_difference(left, right), 2 * TOLERANCE[torch.bfloat16])
        report.check(f"{what}, cut", float((right[0, width // 3 :]).abs().max()), 0.0)
    return {"seconds": round(seconds, 1), "graphs": len(replayed.replays)}


def vectors_of(pipeline: Pipeline, rows: Sequence[Row]) -> Tensor:
    """(B, D) as served, in full width."""
    width = pipeline.encoder.manifest.width
    return torch.from_numpy(pipeline.launch(rows, [width] * len(rows)).wait().copy())
