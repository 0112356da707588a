"""What only a GPU can show: its kernels against the CPU's, and a text's independence of its batch mates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model_store.attention import choose_kernel
from model_store.encoder import Encoder
from model_store.packing import PackedBatch
from tests.tiny import FAMILIES, build_tiny, normalized, random_rows

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
    assert choose_kernel("auto", cuda, torch.bfloat16, softcap=False) == "torch-flash"
    assert choose_kernel("auto", cuda, torch.float32, softcap=False) == "sdpa"


def test_neighbours_do_not_matter(encoder: Path) -> None:
    alone = vectors(encoder, "cuda", "bfloat16", [40])[0]
    among = vectors(encoder, "cuda", "bfloat16", [40, 512, *[7] * 63])[0]
    assert alone @ among > 0.9999
