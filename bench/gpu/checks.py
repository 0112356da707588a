"""Step 2: do the fast paths compute what the slow ones do?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu.inputs import SHAPES, Row, random_encoder, rows_of
from bench.gpu.report import Report
from model_store.build.self_test import TOLERANCE, compile_checked, largest_difference
from model_store.encoder.attention import Layout, packed_sdpa, packed_torch_flash
from model_store.encoder.pipeline import Pipeline, graph_sizes
from model_store.encoder.pooling import Wanted
from model_store.encoder.quantization import EmulatedFp8Linear, Fp8Linear

# H query heads, G key/value heads, d head width

_LENGTHS = [1, 3, 16, 17, 70, 9, 300, 1013]

# Below, at and above a block of texts that are taken together, and the last beyond every graph.
_BATCHES = ([1], [16], [5, 3, 2], [9, 60, 30], [8] * 30, [17] * 29, [500], [1013, 70], [2048], [2000, 700])


def fast_paths(report: Report) -> None:
    """What can break the device comes last."""
    lacks = report.lacks_cuda()
    report.step("flash attention", 20, lambda: flash_attention(report), lacks)
    report.step("fp8 layer", 10, lambda: fp8_layer(report), lacks)
    report.step("captured against eager", 60, lambda: captured_against_eager(report), lacks)


def flash_attention(report: Report) -> dict[str, float]:
    """‖out − ref‖ / ‖ref‖ of the varlen kernel, against each text by itself in float32."""
    starts = np.concatenate([[0], np.cumsum(_LENGTHS)]).astype(np.int32)
    cu_seqlens = torch.from_numpy(starts)
    found = {}
    # Heads of 60 numbers are widened to a multiple of 8.
    for width, (heads, groups), window in itertools.product((60, 64, 128, 256), ((8, 8), (8, 2)), (None, 100, 511)):
        shape = (int(starts[-1]), width)
        made = partial(torch.randn, device=report.device, dtype=torch.bfloat16)
        query, key, value = made(1, heads, *shape), made(1, groups, *shape), made(1, groups, *shape)
        layout = partial(Layout, longest=max(_LENGTHS), scale=width**-0.5, window=window)
        expected = packed_sdpa(query.float(), key.float(), value.float(), layout(cu_seqlens))
        out = packed_torch_flash(query, key, value, layout(cu_seqlens.to(report.device)))
        error = float((out.float() - expected).norm() / expected.norm())
        name = f"flash d{width} {heads}/{groups} window {window}"
        found[name] = float(f"{error:.3g}")
        report.check(name, error, 1e-2)
    return found


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


def captured_against_eager(report: Report) -> dict[str, Any]:
    """Six layers of 1.3B, compiled and captured, for several batches with different widths, one after another."""
    shape = SHAPES[report.shapes]["1.3B"]
    encoder = random_encoder(shape, report.device, layers=min(6, shape[1]["num_hidden_layers"]))
    width = encoder.manifest.width
    given = [rows_of(lengths, seed=seed) for seed, lengths in enumerate(_BATCHES)]
    widths = [[width if i % 2 else width // 3 for i in range(len(rows))] for rows in given]

    def vectors(pipeline: Pipeline) -> list[Tensor]:
        return [vectors_of(pipeline, rows, cut) for rows, cut in zip(given, widths, strict=True)]

    eager = vectors(Pipeline(encoder))
    if report.compile:
        compile_checked(encoder)
    captured = Pipeline(encoder).with_graphs(
        [*graph_sizes(64), 512] if report.shapes == "tiny" else [*graph_sizes(512), 2048]
    )
    for rows, left, right in zip(given, eager, vectors(captured), strict=True):
        what = f"captured, {len(rows)} texts of {sum(map(len, rows))} tokens"
        report.check(what, largest_difference(left, right), 2 * TOLERANCE[torch.bfloat16])
        report.check(f"{what}, cut", float(right[0, width // 3 :].abs().max()), 0.0)
    return {"graphs": len(captured.replays), "compiled": report.compile}


def vectors_of(pipeline: Pipeline, rows: Sequence[Row], widths: Sequence[int] = ()) -> Tensor:
    """(B, D) as served, in full width if none is given."""
    full = [pipeline.encoder.manifest.width] * len(rows)
    return torch.from_numpy(pipeline.launch(rows, [Wanted(width) for width in widths or full]).wait().copy())
