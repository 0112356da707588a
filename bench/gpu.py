"""What the encoder and the server do on a GPU: right, and how near to what the device can do at most.

    python -m bench.gpu kernels --out DIR      do the fast paths compute what the slow ones do?
    python -m bench.gpu forward --out DIR      time of a batch by its tokens, lone queries, mixed lengths
    python -m bench.gpu serve   --out DIR      the same over HTTP, and queries beside bulk

Each ends within --seconds: what no longer fits is named under "skipped", with the reason. DIR/gpu_PART.json is written
after every step, so that a run that is killed leaves what it had; the same is the last line printed. The exit status
is 1 if a step failed or a check did. `--shapes tiny` tries everything that needs no GPU on the CPU, in a minute.

The weights are random, of real models' shapes, and made on the device. `kernels` and `forward` need torch and
transformers only: where pydantic is missing something empty stands in for `model_store.manifest`, whose classes no
encoder made in memory uses. `serve` needs what pyproject.toml names. For a machine without a network bring along
what it lacks (4 MB), made here, and used there:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform \
        manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -c constraints.txt \
        -d WHEELS fastapi starlette opentelemetry-api pydantic pydantic-core pydantic-settings annotated-types \
        annotated-doc typing-extensions typing-inspection python-dotenv uvicorn httptools orjson pybase64
    pip install --no-index --no-deps --target SITE WHEELS/*.whl && export PYTHONPATH=SITE
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedTokenizerFast

if importlib.util.find_spec("pydantic") is None:
    sys.modules["model_store.manifest"] = MagicMock()

from bench.report import machine
from bench.texts import mixed_texts, sentences
from model_store.attention import Layout, choose_kernel, implementation_name, packed_sdpa, packed_torch_flash
from model_store.encoder import Encoder, choose_device
from model_store.packing import PackedBatch
from model_store.pipeline import GRAPH_TOKENS, Pipeline, forward
from model_store.pooling import pool
from model_store.quantization import EmulatedFp8Linear, Fp8Linear, emulate_fp8, quantize, quantize_rows
from model_store.roofline import attention_flops, gemm_flops_per_second, linear_flops_per_token
from model_store.self_test import TOLERANCE, _padded_vectors, compile_checked, largest_difference
from model_store.tokenizer import TokenizedText
from service.cost_model import fit

# T packed tokens, B texts, H query heads, G key/value heads, d head width, M × K by K × N a matrix product

Shape = tuple[str, dict[str, Any]]
Row = TokenizedText


def _llama(width: int, layers: int, heads: int, groups: int, mlp: int, vocabulary: int, **others: Any) -> Shape:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": mlp, "vocab_size": vocabulary}
    return "llama", {**sizes, "num_attention_heads": heads, "num_key_value_heads": groups, **others}


def _gemma3(width: int, layers: int, head: int, mlp: int, vocabulary: int, **others: Any) -> Shape:
    others = {"head_dim": head, "query_pre_attn_scalar": head, **others}
    return "gemma3_text", _llama(width, layers, 4, 1, mlp, vocabulary, **others)[1]


# By name; the most important first.
SHAPES: dict[str, dict[str, Shape]] = {
    "real": {
        "8B": _llama(4096, 32, 32, 8, 14336, 128256, max_position_embeddings=8192),
        "1.3B": _llama(2048, 24, 16, 16, 5504, 32000, max_position_embeddings=32768),
        "270M": _gemma3(640, 18, 256, 2048, 262144, sliding_window=512, max_position_embeddings=32768),
    },
    "tiny": {
        "1.3B": _llama(64, 2, 4, 2, 96, 12000, max_position_embeddings=8192, initializer_range=0.15),
        "270M": _gemma3(64, 6, 32, 96, 12000, sliding_window=16, initializer_range=0.15),
    },
}
# Small models of every head width, with and without shared keys and windows: only their attention matters.
FAMILIES: dict[str, Shape] = {
    "llama d64": _llama(512, 3, 8, 8, 768, 512, initializer_range=0.06),
    "llama d128 shared": _llama(1024, 3, 8, 2, 1536, 512, initializer_range=0.04),
    "qwen3 d128 shared": ("qwen3", _llama(512, 3, 8, 2, 768, 512, head_dim=128, initializer_range=0.06)[1]),
    "mistral d64 window": ("mistral", _llama(512, 3, 8, 2, 768, 512, sliding_window=100, initializer_range=0.06)[1]),
    "gemma3 d256 window": _gemma3(640, 7, 256, 1024, 512, sliding_window=100, initializer_range=0.05),
}
TARGETS = {
    "8B": {"of_ceiling_at_8192": ">= 0.70", "lone_to_floor": "<= 1.3"},
    "1.3B": {"tokens_per_second": ">= 190000", "lone_p50_ms": "<= 2"},
    "mixed": {"ours / padded, sorted": ">= 2.5"},
    "serve": {"http / engine": ">= 0.95"},
}
SWEEP = {"real": [16 << i for i in range(11)], "tiny": [16, 32, 64]}
HEADLINE_TOKENS = {"real": 8192, "tiny": 64}
MIXED_TEXTS = {"real": 512, "tiny": 8}
BATCH_TOKENS = {"real": 8192, "tiny": 512}
TEXT_TOKENS = 128
LENGTHS = [1, 3, 16, 17, 70, 9, 300, 1013]


class Report:
    """What is known so far, kept in a file; and the time that is left."""

    def __init__(self, part: str, options: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        self.shapes: str = options.shapes
        self.compile: bool = device.type == "cuda" if options.compile is None else options.compile
        self._file = options.out / f"gpu_{part}.json"
        self._ends = time.perf_counter() + options.seconds
        self.checks: dict[str, Any] = {}
        self.figures: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self._head = {"benchmark": f"gpu_{part}", "machine": about(device, options.commit), "shapes": options.shapes}
        self.save()

    def step(self, name: str, needs_seconds: float, run: Callable[[], Any], lacks: str = "") -> Any:
        """The figures that `run` gives, or None if it fails, or lacks something, or its time is over."""
        began = time.perf_counter()
        left = self._ends - began
        if not lacks and self.shapes == "real" and needs_seconds > left:
            lacks = f"about {needs_seconds:.0f} s, {left:.0f} are left"
        if lacks:
            self.skipped[name] = f"needs {lacks}"
            print(f"{name}: skipped, needs {lacks}", flush=True)
            self.save()
            return None
        found = None
        try:
            found = self.figures[name] = run()
        except Exception as error:
            self.errors[name] = "".join(traceback.format_exception(error))[-3000:]
        took = round(time.perf_counter() - began, 1)
        print(f"{name} ({took} s): {self.errors.get(name) or json.dumps(found)}", flush=True)
        self.save()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def check(self, name: str, value: float, limit: float) -> None:
        """Note whether a difference is small enough; NaN is not."""
        self.checks[name] = {"value": float(f"{value:.3g}"), "limit": limit, "ok": bool(value <= limit)}
        if not value <= limit:
            print(f"CHECK FAILED {name}: {value:.3g} > {limit}", flush=True)

    def needs_cuda(self, compiler: bool = False) -> str:
        """What is lacking for a step."""
        on_cuda = "" if self.device.type == "cuda" else "CUDA"
        return ("" if self.compile else "--compile") if compiler else on_cuda

    @property
    def document(self) -> dict[str, Any]:
        """All of it."""
        kept = {name: getattr(self, name) for name in ("checks", "figures", "skipped", "errors")}
        return {**self._head, "targets": TARGETS, **kept}

    def save(self) -> None:
        """Write it."""
        self._file.write_text(json.dumps(self.document, indent=1) + "\n")

    @property
    def failed(self) -> bool:
        """Whether anything did."""
        return bool(self.errors) or not all(check["ok"] for check in self.checks.values())


def about(device: torch.device, commit: str) -> dict[str, Any]:
    """The machine and its device; the commit as given, where the files come without their history."""
    try:
        found = machine()
    except OSError:  # no git
        found = {"versions": {"torch": torch.__version__}}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "device_gb": round(properties.total_memory / 1e9, 1)}
    return {**found, "cuda": torch.version.cuda, **({"commit": commit} if commit else {})}


# What is measured: encoders of random weights, and rows of random tokens.


def random_encoder(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16, layers: int | None = None
) -> Encoder:
    """Seeded weights of a shape, or of some of its layers, made on the device; the fastest kernel there."""
    family, sizes = shape
    config = CONFIG_MAPPING[family](**{**sizes, "num_hidden_layers": layers or sizes["num_hidden_layers"]})
    kernel = choose_kernel("auto", device, dtype, softcap=False)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModel.from_config(config, dtype=dtype, attn_implementation=implementation_name(kernel))
    manifest: Any = SimpleNamespace(pooling="mean", width=config.hidden_size, model_type=family)
    return Encoder(model.eval().requires_grad_(False).to(device), manifest, device, dtype, kernel)


def rows_of(lengths: Sequence[int], vocabulary: int = 500, seed: int = 0) -> list[Row]:
    """A row of random tokens of each length."""
    generator = np.random.default_rng(seed)
    return [Row(generator.integers(3, vocabulary, length).tolist(), 0) for length in lengths]


def even_lengths(tokens: int, longest: int = TEXT_TOKENS) -> list[int]:
    """So many tokens in texts of one length."""
    return [min(tokens, longest)] * (tokens // min(tokens, longest))


def vectors_of(pipeline: Pipeline, rows: Sequence[Row]) -> Tensor:
    """(B, D) as served, in full width."""
    width = pipeline.encoder.manifest.width
    return torch.from_numpy(pipeline.launch(rows, [width] * len(rows)).wait().copy())


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


def trained_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with words as whole as a real one's, and BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<pad>", "<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    bos = [("<bos>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="$A $B", special_tokens=bos)
    return tokenizer


# Clocks.


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def device_seconds(run: Callable[[], object], device: torch.device, budget: float = 0.5) -> float:
    """The median time of one of many calls queued behind each other, after two that don't count."""
    run()
    sync(device)
    began = time.perf_counter()
    run()
    sync(device)
    rounds = min(max(int(budget / (time.perf_counter() - began)), 3), 100)
    if device.type == "cpu":
        return statistics.median(host_seconds(run) for _ in range(rounds))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    sync(device)
    milliseconds: list[float] = [start.elapsed_time(end) for start, end in marks]
    return statistics.median(milliseconds) / 1000


def host_seconds(run: Callable[[], object]) -> float:
    """The time until a call returns."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def launch_seconds(pipeline: Pipeline, rows: Sequence[Row], rounds: int) -> tuple[list[float], list[float]]:
    """Times until vectors are there, and until `launch` returns, one batch at a time."""
    widths = [pipeline.encoder.manifest.width] * len(rows)
    whole, launched = [], []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        pending = pipeline.launch(rows, widths)
        launched.append(time.perf_counter() - began)
        pending.wait()
        whole.append(time.perf_counter() - began)
    return whole[2:], launched[2:]


def pipelined(pipeline: Pipeline, batches: Sequence[Sequence[Row]]) -> tuple[float, Tensor]:
    """Seconds for all batches, each queued before the one before it is awaited, and their vectors."""
    width = pipeline.encoder.manifest.width
    began, found, before = time.perf_counter(), [], None
    for batch in [*batches, None]:
        pending = pipeline.launch(batch, [width] * len(batch)) if batch else None
        if before is not None:
            found.append(before.wait())
        before = pending
    return time.perf_counter() - began, torch.from_numpy(np.concatenate(found))


def packed_batches(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """In their order, as full as so many tokens allow."""
    batches: list[list[Row]] = [[]]
    for row in rows:
        if batches[-1] and sum(map(len, batches[-1])) + len(row) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def ms(seconds: float) -> float:
    """Milliseconds for people."""
    return float(f"{seconds * 1000:.4g}")


# The device's limits.


def ceilings(report: Report) -> dict[str, float]:
    """Operations a second of large matrix products, and bytes read and written by a copy; what is missing failed."""
    device, real = report.device, report.shapes == "real"

    def copy_and_roofline() -> dict[str, float]:
        source = torch.ones((1 << 32) if real else (1 << 22), dtype=torch.uint8, device=device)
        copy = partial(torch.empty_like(source).copy_, source)
        found = {"bytes_per_second": 2 * source.numel() / device_seconds(copy, device)}
        return found | ({"flops_by_roofline.py": gemm_flops_per_second(device, torch.bfloat16)} if real else {})

    fp8_lacks = report.needs_cuda()
    return {
        **(report.step("ceiling bf16", 10, lambda: {"bf16_flops": best_product(device, real, plain_product)}) or {}),
        **(report.step("ceiling copy", 10, copy_and_roofline) or {}),
        **(
            report.step("ceiling fp8", 10, lambda: {"fp8_flops": best_product(device, real, fp8_product)}, fp8_lacks)
            or {}
        ),
    }


def best_product(device: torch.device, real: bool, prepare: Callable[[Tensor, Tensor], Callable[[], Tensor]]) -> float:
    """The highest rate of several sizes, on random numbers: constants are multiplied faster."""
    best = 0.0
    for m, k, n in [(8192, 8192, 8192), (8192, 4096, 14336), (16384, 4096, 4096)] if real else [(64, 64, 64)]:
        left, right = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
        best = max(best, 2 * m * k * n / device_seconds(prepare(left, right), device))
    return float(f"{best:.4g}")


def plain_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """left · rightᵀ as it is."""
    return partial(torch.matmul, left, right.t())


def fp8_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """left · rightᵀ in 8 bits, quantised before."""
    (left8, scale_a), (right8, scale_b) = quantize_rows(left), quantize_rows(right)
    scales = {"scale_a": scale_a, "scale_b": scale_b.t().contiguous()}
    return partial(torch._scaled_mm, left8, right8.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


# Part 1: kernels.


def kernels(report: Report) -> None:
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
    """A text's vector does not depend on its batch mates, but for the rounding of differently tiled products."""
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
        batch = PackedBatch.pack(rows_of([length] * (max(lengths) // length)), "mean").to(device)
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
    replayed = plain.with_graphs()
    seconds = time.perf_counter() - began
    for seed, lengths in enumerate(
        ([1], [16], [5, 3, 2], [9, 60, 30], [8] * 30, [17] * 59, [1013, 70], [2048], [2000])
    ):
        rows = rows_of(lengths, seed=seed)
        widths = [width if i % 2 else width // 3 for i in range(len(rows))]
        held = [graph.tokens for graph in replayed.graphs if graph.holds(PackedBatch.pack(rows, "mean"))]
        left, right = (torch.from_numpy(way.launch(rows, widths).wait().copy()) for way in (plain, replayed))
        what = f"graphs {name}, {len(rows)} texts of up to {max(lengths)} in {held[0] if held else 'none'}"
        report.check(what, largest_difference(left, right), 2 * TOLERANCE[torch.bfloat16])
        report.check(f"{what}, cut", float((right[0, width // 3 :]).abs().max()), 0.0)
    return {"seconds": round(seconds, 1), "graphs": len(replayed.graphs)}


# Part 2: the forward pass.


def forward_part(report: Report) -> None:
    """Headlines of every shape first, then all of each."""
    device, size = report.device, report.shapes
    torch._dynamo.config.recompile_limit = 64  # for all models together, which share their layers' code
    # A limit that could not be measured leaves its shares NaN, and the times as they are.
    limits = {"bf16_flops": math.nan, "fp8_flops": math.nan, "bytes_per_second": math.nan, **ceilings(report)}
    built: dict[str, Encoder] = {}
    with_graphs: dict[str, Pipeline] = {}

    def headline(name: str) -> None:
        def build() -> dict[str, int]:
            built[name] = random_encoder(SHAPES[size][name], device)
            return {"flops_per_token": linear_flops_per_token(built[name].model)}

        def capture() -> dict[str, float]:
            began = time.perf_counter()
            with_graphs[name] = Pipeline(built[name]).with_graphs()
            return {"seconds": round(time.perf_counter() - began, 1)}

        if report.step(f"{name} build", 15, build) is None:
            return
        encoder, tokens = built[name], HEADLINE_TOKENS[size]
        # What fails here leaves the encoder as it was, and the rest is measured without it.
        lacks = report.needs_cuda(compiler=True)
        report.step(f"{name} compile", 60, lambda: {"seconds": round(_compile(report, encoder), 1)}, lacks)
        report.step(f"{name} at {tokens}", 5, lambda: sweep(Pipeline(encoder), [tokens], limits["bf16_flops"]))
        report.step(f"{name} capture", 15, capture, report.needs_cuda())
        report.step(f"{name} lone", 5, lambda: lone(with_graphs.get(name, Pipeline(encoder)), limits, 2))
        print(f"{name} targets: {json.dumps(TARGETS.get(name))}", flush=True)

    def tables(name: str) -> None:
        encoder, lacks = built[name], report.needs_cuda()
        table = partial(sweep, token_counts=SWEEP[size], peak=limits["bf16_flops"])
        compiled = "" if f"{name} compile" in report.figures else "compiled layers"
        report.step(f"{name} compiled", 25, lambda: table(Pipeline(encoder)), compiled)
        small = partial(
            sweep, token_counts=[n for n in SWEEP[size] if n <= GRAPH_TOKENS[-1]], peak=limits["bf16_flops"]
        )
        report.step(f"{name} graphs", 10, lambda: small(with_graphs[name]), "" if name in with_graphs else "graphs")
        report.step(f"{name} behind another", 5, lambda: behind_another(Pipeline(encoder)), lacks)

        def eager() -> dict[str, Any]:
            with eager_layers(encoder):
                return {**table(Pipeline(encoder)), "lone": lone(Pipeline(encoder), limits, 2)}

        report.step(f"{name} eager", 25, eager)

    def fp8(name: str) -> dict[str, Any]:
        encoder = built[name]
        with_graphs.pop(name, None)
        encoder.uncompile_layers()
        quantize(encoder.model, "fp8", device)
        _compile(report, encoder)
        counts = [tokens for tokens in SWEEP[size] if tokens >= 256]
        found = sweep(Pipeline(encoder), counts, limits["fp8_flops"])
        return found | {"lone": lone(Pipeline(encoder).with_graphs([16]), limits, 1)}

    names = list(SHAPES[size])
    for some in (names[:2], names[2:]):
        for name in some:
            headline(name)
        for name in [name for name in some if name in built]:
            tables(name)
            pipeline = with_graphs.get(name, Pipeline(built[name]))
            report.step(f"{name} mixed", 40, partial(mixed, report, built[name], pipeline))
            del pipeline
        for name in [name for name in some if name in built]:
            if name == "1.3B":
                report.step(f"{name} sentence-transformers", 30, partial(sentence_transformers, report, built[name]))
            report.step(f"{name} fp8", 60, partial(fp8, name), report.needs_cuda())
            with_graphs.pop(name, None)
            del built[name]


def _compile(report: Report, encoder: Encoder) -> float:
    """The seconds it takes, if it is to be done."""
    return host_seconds(partial(compile_checked, encoder)) if report.compile else 0.0


def sweep(pipeline: Pipeline, token_counts: Sequence[int], peak: float) -> dict[str, Any]:
    """By tokens: the device's time, the caller's and the host's, the rate and its share of the peak; and the fit."""
    encoder = pipeline.encoder
    device, config = encoder.device, encoder.model.config
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    table, measured = {}, {}
    for tokens in token_counts:
        lengths = even_lengths(tokens)
        rows = rows_of(lengths, config.vocab_size)
        batch, widths = PackedBatch.pack(rows, "mean"), torch.tensor([encoder.manifest.width] * len(rows))
        graph = next((graph for graph in pipeline.graphs if graph.holds(batch)), None)
        if graph is not None:
            seconds = device_seconds(partial(graph.replay, batch, widths), device)
        else:
            run = partial(forward, encoder, batch.filled_up_to(16).to(device), widths.to(device))
            seconds = device_seconds(run, device)
        whole, launched = launch_seconds(pipeline, rows, min(max(int(0.3 / seconds), 3), 50))
        flops = linear_flops_per_token(encoder.model) * tokens + attention_flops(config, lengths)
        measured[tokens] = statistics.median(whole)
        table[str(tokens)] = {
            "device_ms": ms(seconds),
            "wall_ms": ms(measured[tokens]),
            "host_ms": ms(statistics.median(launched)),
            "tokens_per_second": round(tokens / seconds),
            "of_ceiling": float(f"{flops / seconds / peak:.3g}"),
        }
    found: dict[str, Any] = {"by_tokens": table}
    if len(measured) > 1:
        try:
            cost = fit(measured)
            rounded = {name: float(f"{value:.4g}") for name, value in asdict(cost).items()}
            found["fit"] = {**rounded, "efficient_tokens": cost.efficient_tokens()}
        except ValueError as error:
            found["fit"] = str(error)
    if device.type == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    return found


def lone(pipeline: Pipeline, limits: dict[str, float], bytes_per_weight: int) -> dict[str, float]:
    """A query of 16 tokens with nothing beside it, and the time that reading the weights takes."""
    config = pipeline.encoder.model.config
    rounds = 300 if pipeline.encoder.device.type == "cuda" else 10
    whole, launched = launch_seconds(pipeline, rows_of([16], config.vocab_size), rounds)
    floor = linear_flops_per_token(pipeline.encoder.model) / 2 * bytes_per_weight / limits["bytes_per_second"]
    median, slow = np.percentile(whole, (50, 99))
    return {
        "p50_ms": ms(median),
        "p99_ms": ms(slow),
        "host_ms": ms(statistics.median(launched)),
        "floor_ms": ms(floor),
        "to_floor": float(f"{median / floor:.3g}"),
    }


def behind_another(pipeline: Pipeline) -> dict[str, float]:
    """How long `launch` takes behind a large batch: as long as that batch takes, if it waits for it."""
    large, small = (rows_of(even_lengths(tokens)) for tokens in (8192, 4096))
    widths = [pipeline.encoder.manifest.width] * len(large)
    found = []
    for _ in range(5):
        sync(pipeline.encoder.device)
        began = time.perf_counter()
        first = pipeline.launch(large, widths)
        launched = time.perf_counter()
        second = pipeline.launch(small, widths[: len(small)])
        behind = time.perf_counter()
        first.wait()
        ready = time.perf_counter()
        second.wait()
        found.append((launched - began, behind - launched, ready - began))
    launch, behind, whole = (statistics.median(times) for times in zip(*found, strict=True))
    return {"launch_ms": ms(launch), "launch_behind_ms": ms(behind), "first_ready_ms": ms(whole)}


def mixed(report: Report, encoder: Encoder, pipeline: Pipeline) -> dict[str, Any]:
    """Packed batches in the order of the texts, against padded batches of 32 through transformers' SDPA."""
    texts = mixed_texts(MIXED_TEXTS[report.shapes])
    rows = [Row(encoding.ids, 0) for encoding in trained_tokenizer().encode_batch(texts)]
    by_length = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    tokens = sum(map(len, rows))
    batches = packed_batches(rows, BATCH_TOKENS[report.shapes])
    pipelined(pipeline, batches)
    rates: dict[str, list[float]] = {"ours": [], "padded, sorted": [], "padded, in order": []}
    with eager_layers(encoder):
        padded_vectors(encoder, rows[:32], range(min(32, len(rows))))
    for _ in range(2):
        seconds, packed = pipelined(pipeline, batches)
        rates["ours"].append(tokens / seconds)
        with eager_layers(encoder):
            for name, order in (("padded, sorted", by_length), ("padded, in order", range(len(rows)))):
                began = time.perf_counter()
                padded = padded_vectors(encoder, rows, order)
                rates[name].append(tokens / (time.perf_counter() - began))
    # Random weights: the rounding of as many layers as the model has, with nothing that was learned to dampen it.
    report.check(f"mixed, {len(encoder.model.layers)} layers", largest_difference(packed, padded), 0.05)
    best = {name: round(max(found)) for name, found in rates.items()}
    ratios = {f"ours / {name}": round(best["ours"] / best[name], 2) for name in list(best)[1:]}
    return {"texts": len(rows), "tokens": tokens, "longest": len(rows[by_length[0]]), **best, **ratios}


@torch.inference_mode()
def padded_vectors(encoder: Encoder, rows: Sequence[Row], order: Sequence[int]) -> Tensor:
    """(B, D) by way of transformers' own attention, in batches of 32 padded to their longest."""
    found: list[Tensor] = [torch.empty(0)] * len(order)
    encoder.model.set_attn_implementation("sdpa")
    try:
        for start in range(0, len(order), 32):
            places = order[start : start + 32]
            parts = [torch.tensor(rows[place].token_ids) for place in places]
            ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(encoder.device)
            lengths = torch.tensor([len(part) for part in parts], device=encoder.device)
            mask = (torch.arange(ids.shape[1], device=encoder.device) < lengths[:, None]).long()
            output = encoder.model(input_ids=ids, attention_mask=mask, is_causal=False, use_cache=False)
            sums = (output.last_hidden_state * mask[..., None]).sum(1).float()
            for place, vector in zip(places, torch.nn.functional.normalize(sums).cpu(), strict=True):
                found[place] = vector
    finally:
        encoder.model.set_attn_implementation(implementation_name(encoder.kernel))
    return torch.stack(found)


def sentence_transformers(report: Report, encoder: Encoder) -> dict[str, float]:
    """The same weights and texts through sentence-transformers, tokenizing included, by way of a folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    texts = mixed_texts(MIXED_TEXTS[report.shapes])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained_tokenizer(), pad_token="<pad>", bos_token="<bos>")
    tokens = sum(map(len, tokenizer(texts)["input_ids"]))
    with tempfile.TemporaryDirectory() as folder, eager_layers(encoder):
        encoder.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        kwargs = {"dtype": encoder.dtype, "attn_implementation": "sdpa"}
        transformer = Transformer(folder, max_seq_length=8192, model_kwargs=kwargs)
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
        peer = SentenceTransformer(modules=[transformer, pooling], device=str(encoder.device))
    peer.encode(texts[:32])
    seconds = min(host_seconds(partial(peer.encode, texts, batch_size=32)) for _ in range(2))
    return {"tokens": tokens, "tokens_per_second": round(tokens / seconds)}


# Part 3: the server.


def serve(report: Report) -> None:
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
    _compile(report, encoder)
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
    import service.app
    import service.server
    import service.worker
    from service.settings import Settings

    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    made = SimpleNamespace(load=lambda *_: random_encoder(shape, choose_device(device)))
    vars(service.worker)["Encoder"] = made
    vars(service.app)["version"] = lambda name: "0"  # it need not be installed
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


PARTS: dict[str, Callable[[Report], None]] = {"kernels": kernels, "forward": forward_part, "serve": serve}


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--shapes", choices=SHAPES, default="real")
    parser.add_argument("--seconds", type=float, default=480.0, help="end by then (default %(default)s)")
    parser.add_argument("--commit", default="", help="what is measured, where there is no git history to ask")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="by default on a GPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = choose_device("auto" if options.shapes == "real" else "cpu")
    if options.shapes == "real" and device.type != "cuda":
        parser.error("real shapes need a GPU: try --shapes tiny")
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny shapes only lose time to more
    report = Report(options.part, options, device)
    PARTS[options.part](report)
    print(json.dumps(report.document))
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
