"""What only a GPU can show: its kernels against the CPU's, and what a text's batch mates do to its vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model_store.attention import Layout, choose_kernel, packed_sdpa, packed_torch_flash
from model_store.encoder import Encoder
from model_store.packing import PackedBatch
from tests.tiny import FAMILIES, build_tiny, normalized, random_rows, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [1, 3, 16, 17, 18, 70, 9, 300]


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "encoder"
    build_tiny(folder, request.param)
    return folder


def vectors(folder: Path, device: str, dtype: Any, lengths: list[int]) -> torch.Tensor:
    loaded = Encoder.load(folder, device=device, dtype=dtype)
    return normalized(loaded.encode(PackedBatch.pack(random_rows(lengths), "mean")))


def test_float32_equals_the_cpu(encoder: Path) -> None:
    on_cpu = vectors(encoder, "cpu", "float32", LENGTHS)
    assert (vectors(encoder, "cuda", "float32", LENGTHS) - on_cpu).abs().max() < 1e-4


def test_bfloat16_is_near_float32(encoder: Path) -> None:
    cosines = (vectors(encoder, "cuda", "bfloat16", LENGTHS) * vectors(encoder, "cpu", "float32", LENGTHS)).sum(1)
    assert cosines.min() > 0.99


def test_the_flash_kernel_is_chosen_for_16_bit() -> None:
    cuda = torch.device("cuda")
    assert choose_kernel("auto", cuda, torch.bfloat16, tiny_config("llama")) == "torch-flash"
    assert choose_kernel("auto", cuda, torch.float32, tiny_config("llama")) == "sdpa"


def test_batch_mates_move_a_vector_by_rounding_at_most(encoder: Path) -> None:
    """cuBLAS chooses its kernel by the number of rows; bench/gpu/kernels.py has the same bound."""
    alone = vectors(encoder, "cuda", "bfloat16", [40])[0]
    among = vectors(encoder, "cuda", "bfloat16", [40, 512, *[7] * 63])[0]
    assert alone @ among > 0.999


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
