"""Part 2: time of a batch by its tokens, lone queries, mixed lengths; and the same through sentence-transformers."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bench.gpu.ceilings import ceilings
from bench.gpu.clocks import device_seconds, host_seconds, launch_seconds, ms, packed_batches, pipelined, sync
from bench.gpu.inputs import SHAPES, Row, random_encoder, rows_of, trained_tokenizer
from bench.gpu.report import TARGETS, Report
from bench.texts import mixed_texts
from model_store.attention import implementation_name
from model_store.encoder import Encoder
from model_store.packing import PackedBatch
from model_store.pipeline import Pipeline, forward, graph_sizes
from model_store.quantization import quantize
from model_store.self_test import compile_checked, largest_difference
from model_store.shape import Shape
from service.cost_model import fit

SWEEP = {"real": [16 << i for i in range(11)], "tiny": [16, 32, 64]}
HEADLINE_TOKENS = {"real": 8192, "tiny": 64}
MIXED_TEXTS = {"real": 512, "tiny": 8}
BATCH_TOKENS = {"real": 8192, "tiny": 512}
TEXT_TOKENS = 128


def measure(report: Report) -> None:
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
            return {"flops_per_token": shape_of(built[name]).linear_flops_per_token}

        def compile_layers() -> dict[str, float]:
            return {"seconds": round(host_seconds(partial(compile_checked, built[name])), 1)}

        def capture() -> dict[str, float]:
            began = time.perf_counter()
            with_graphs[name] = Pipeline(built[name]).with_graphs(graph_sizes(2048))
            return {"seconds": round(time.perf_counter() - began, 1)}

        if report.step(f"{name} build", 15, build) is None:
            return
        encoder, tokens = built[name], HEADLINE_TOKENS[size]
        # What fails here leaves the encoder as it was, and the rest is measured without it.
        lacks = report.needs_cuda(compiler=True)
        report.step(
            f"{name} compile", 60, lambda: {"seconds": round(host_seconds(partial(compile_checked, encoder)), 1)}, lacks
        )
        report.step(f"{name} at {tokens}", 5, lambda: sweep(Pipeline(encoder), [tokens], limits["bf16_flops"]))
        report.step(f"{name} capture", 15, capture, report.needs_cuda())
        report.step(f"{name} lone", 5, lambda: lone(with_graphs.get(name, Pipeline(encoder)), limits, 2))
        print(f"{name} targets: {json.dumps(TARGETS.get(name))}", flush=True)

    def tables(name: str) -> None:
        encoder, lacks = built[name], report.needs_cuda()
        table = partial(sweep, token_counts=SWEEP[size], peak=limits["bf16_flops"])
        compiled = "" if f"{name} compile" in report.figures else "compiled layers"
        report.step(f"{name} compiled", 25, lambda: table(Pipeline(encoder)), compiled)
        small = partial(sweep, token_counts=[n for n in SWEEP[size] if n <= 2048], peak=limits["bf16_flops"])
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
        if report.compile:
            compile_checked(encoder)
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


def shape_of(encoder: Encoder) -> Shape:
    """The sizes of its decoder."""
    return Shape.read(encoder.model.config.to_dict())


def even_lengths(tokens: int) -> list[int]:
    """So many tokens in texts of one length."""
    length = min(tokens, TEXT_TOKENS)
    return [length] * (tokens // length)


def sweep(pipeline: Pipeline, token_counts: Sequence[int], peak: float) -> dict[str, Any]:
    """By tokens: the device's time, the caller's and the host's, the rate and its share of the peak; and the fit."""
    encoder = pipeline.encoder
    device, config, shape = encoder.device, encoder.model.config, shape_of(encoder)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    table, measured = {}, {}
    for tokens in token_counts:
        lengths = even_lengths(tokens)
        rows = rows_of(lengths, config.vocab_size)
        batch, widths = PackedBatch.pack(rows, "mean"), torch.tensor([encoder.manifest.width] * len(rows))
        graph = next((one.graph for one in pipeline.replays if one.serves(batch)), None)
        if graph is not None:
            seconds = device_seconds(partial(graph.replay, batch, widths), device)
        else:
            run = partial(forward, encoder, encoder.place(batch), widths.to(device))
            seconds = device_seconds(run, device)
        whole, launched = launch_seconds(pipeline, rows, min(max(int(0.3 / seconds), 3), 50))
        flops = shape.linear_flops_per_token * tokens + shape.attention_flops(lengths)
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
    floor = shape_of(pipeline.encoder).linear_parameters * bytes_per_weight / limits["bytes_per_second"]
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
