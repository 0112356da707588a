"""What only a GPU can show: its kernels against the CPU's, and a text's independence of its batch mates.

    python -m pytest -m gpu tests/gpu

needs torch, transformers and pytest alone, but for the worker, which is skipped where pydantic or another of its
packages is missing. The encoders are made in memory: tiny ones, and some layers of a real model's shape.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

from model_store.build.self_test import (
    TOLERANCE,
    check_attention,
    check_same_vectors,
    compile_checked,
    largest_difference,
)
from model_store.encoder.attention import Layout, choose_kernel, packed_sdpa, packed_torch_flash
from model_store.encoder.devices import choose_device
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.encoder.pipeline import Pipeline, graph_sizes
from model_store.encoder.pooling import Wanted
from model_store.encoder.quantization import EmulatedFp8Linear, Fp8Linear, Quantization
from model_store.rope import readable_positions
from model_store.shape import known_configs
from tests.tiny import FAMILIES, normalized, random_rows, tiny_config, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [1, 3, 16, 17, 18, 70, 9, 300]
REAL = "princeton-nlp/Sheared-LLaMA-1.3B"
WORKER_PACKAGES = ("pydantic", "pydantic_settings", "prometheus_client", "orjson")


def encoder_of(
    model: Any, device: str, dtype: torch.dtype = torch.bfloat16, quantization: Quantization = "none"
) -> Encoder:
    """What `Encoder.load` makes of a stored one."""
    sizes = {"width": model.config.hidden_size, "max_positions": readable_positions(model.config.to_dict())}
    manifest: Any = SimpleNamespace(
        attention="bidirectional", pooling="mean", model_type=model.config.model_type, **sizes
    )
    return Encoder.of(model.to(dtype), manifest, choose_device(device), quantization=quantization)


def model_of(name: str) -> Any:
    """A tiny model of a family, or six layers of random weights in a real model's shape."""
    if name != REAL:
        return tiny_model(name)
    sizes = {**known_configs()[REAL], "num_hidden_layers": 6}
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModel.from_config(CONFIG_MAPPING[sizes.pop("model_type")](**sizes), dtype=torch.bfloat16).eval()


def vectors(encoder: Encoder, lengths: list[int]) -> torch.Tensor:
    return normalized(encoder.encode(PackedBatch.pack(random_rows(lengths), "mean")))


@contextmanager
def no_sync() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_the_cpu(family: str) -> None:
    on_cpu, on_cuda = (encoder_of(tiny_model(family), device, torch.float32) for device in ("cpu", "cuda"))
    assert (vectors(on_cuda, LENGTHS) - vectors(on_cpu, LENGTHS)).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_float32(family: str) -> None:
    on_cpu, on_cuda = encoder_of(tiny_model(family), "cpu", torch.float32), encoder_of(tiny_model(family), "cuda")
    check_attention(on_cuda)
    assert largest_difference(vectors(on_cuda, LENGTHS), vectors(on_cpu, LENGTHS)) < 0.01


@pytest.mark.parametrize("length", [5, 16, 40, 300])
@pytest.mark.parametrize("name", [*FAMILIES, REAL])
def test_neighbours_do_not_matter(name: str, length: int) -> None:
    encoder = encoder_of(model_of(name), "cuda")
    alone, among = vectors(encoder, [length]), vectors(encoder, [length, 512, 200, *[7] * 63])[:1]
    assert largest_difference(alone, among) < 1e-3  # the matrix products choose their kernel by the number of rows


def test_neighbours_do_not_choose_the_frequencies_of_longrope() -> None:
    """Those of a row beyond the original length are others, and a packed row of short texts may be as long."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = tiny_config("phi3")
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    config.original_max_position_embeddings = 64
    config.max_position_embeddings = 512
    torch.manual_seed(0)
    encoder = encoder_of(AutoModel.from_config(config).eval(), "cuda")
    assert encoder.manifest.max_positions == 64
    alone, among = vectors(encoder, [40]), vectors(encoder, [40, *[64] * 8])[:1]
    assert largest_difference(alone, among) < 1e-3


def test_the_flash_kernel_is_chosen_for_16_bit() -> None:
    device, config = choose_device("cuda"), tiny_config("llama")
    assert choose_kernel("auto", device, torch.bfloat16, config) == "torch-flash"
    assert choose_kernel("auto", device, torch.float32, config) == "sdpa"


@pytest.mark.parametrize("width", [20, 60, 64, 128, 256])  # the first two are widened to a multiple of 8
@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 8, 100, 511])
def test_the_flash_kernel_equals_each_text_by_itself(width: int, groups: int, window: int | None, causal: bool) -> None:
    torch.manual_seed(0)
    lengths = [*LENGTHS, 1013]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), width, device="cuda", dtype=torch.bfloat16) for heads in (8, groups, groups)
    )
    layout = Layout(starts, max(lengths), window=window, causal=causal)
    found = packed_torch_flash(query, key, value, replace(layout, cu_seqlens=starts.cuda())).float()
    expected = packed_sdpa(query.float(), key.float(), value.float(), layout)
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_a_forward_pass_waits_for_nothing(family: str) -> None:
    """Soft-capping (gemma2) takes one text after another, on the host."""
    encoder = encoder_of(tiny_model(family), "cuda")
    encoder.hidden(encoder.place(PackedBatch.pack(random_rows(LENGTHS), "mean")))  # so that kernels are loaded
    other = PackedBatch.pack(random_rows([30, 2, 200, 41]), "mean")
    with no_sync():
        hidden = encoder.hidden(encoder.place(other))
    assert hidden.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", REAL])
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_graphs_equal_the_plain_way(name: str, compiled: bool) -> None:
    encoder = encoder_of(model_of(name), "cuda")
    if compiled:
        compile_checked(encoder)
    plain, width = Pipeline(encoder), encoder.manifest.width
    captured = plain.with_graphs([*graph_sizes(512), 2048] if name == REAL else graph_sizes(256))
    check_same_vectors(plain, captured)
    # Below, at and above a block of texts that are taken together, and the last of either beyond every graph.
    batches = [[1], [16], [5, 3, 2], [9, 60, 30], [8] * 20, [17] * 15, [200, 70]]
    if name == REAL:
        batches += [[8] * 30, [17] * 29, [500], [1013, 70], [2048], [2000, 700]]
    for seed, lengths in enumerate(batches):
        rows = random_rows(lengths, seed)
        wanted = [Wanted(width if i % 2 else width // 3) for i in range(len(rows))]
        found, expected = (torch.from_numpy(way.launch(rows, wanted).wait().copy()) for way in (captured, plain))
        assert largest_difference(found, expected) < 2 * TOLERANCE[torch.bfloat16]
        assert not found[0, width // 3 :].any()


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs compute capability 8.9"
)
def test_fp8_equals_its_slow_twin() -> None:
    torch.manual_seed(0)
    device = choose_device("cuda")
    for tokens, bias in itertools.product((16, 17, 333), (False, True)):
        linear = torch.nn.Linear(1024, 512, bias=bias, device=device, dtype=torch.bfloat16)
        x = torch.randn(1, tokens, 1024, device=device, dtype=torch.bfloat16)
        found, expected = (kind(linear, device)(x).float() for kind in (Fp8Linear, EmulatedFp8Linear))
        assert (found - expected).norm() < 0.02 * expected.norm()
    quantized, plain = (
        encoder_of(tiny_model("llama"), "cuda", quantization="fp8"),
        encoder_of(tiny_model("llama"), "cuda"),
    )
    # Random weights lose more to 3 bits after the leading one than trained ones do.
    assert largest_difference(vectors(quantized, LENGTHS), vectors(plain, LENGTHS)) < 0.05


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, WORKER_PACKAGES)), reason=f"needs {', '.join(WORKER_PACKAGES)}"
)
def test_a_worker_starts_on_cuda_with_everything_on(family: str, tmp_path: Path) -> None:
    from service.batching.limits import Limits
    from service.device.worker import EncoderWorker
    from service.embedding.rows import EmbedRow
    from service.metrics import Metrics
    from service.settings import Settings
    from tests.tiny import build_tiny

    folder = tmp_path / "encoder"
    manifest = build_tiny(folder, family)
    settings = Settings(model=str(folder), device="cuda", compile="on", cuda_graphs="on")
    worker = EncoderWorker(folder, settings, Metrics())
    rows = random_rows(LENGTHS)

    async def embedded() -> Any:
        await worker.start(Limits(settings, manifest, "cuda"))
        return await worker.run_batch([EmbedRow(row, manifest.width) for row in rows])

    try:
        found = torch.stack([torch.as_tensor(vector) for vector in asyncio.run(embedded())])
    finally:
        worker.stop()
    assert worker.device == "cuda:0"
    expected = Encoder.load(folder, "cpu", "float32").encode(PackedBatch.pack(rows, "mean"))
    assert largest_difference(found, expected) < 0.01


@pytest.mark.parametrize("window", [None, 8])
def test_gradients_of_the_flash_kernel_are_those_of_scores_in_memory(window: int | None) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    layout = Layout(torch.tensor([0, 7, 40, 41, 100], dtype=torch.int32, device="cuda"), 59, window=window)
    found = []
    for kernel in (packed_torch_flash, packed_sdpa):
        generator.manual_seed(0)
        query, key, value = (
            torch.randn(1, heads, 100, 64, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for heads in (8, 2, 2)
        )
        kernel(query, key, value, layout).float().square().sum().backward()
        found.append([part.grad for part in (query, key, value)])
    for flash, slow in zip(*found, strict=True):
        assert flash is not None
        assert slow is not None
        torch.testing.assert_close(flash, slow, rtol=0.05, atol=0.05)  # bfloat16 rounds to 1/256
