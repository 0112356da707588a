"""The official library loads our adapters, and gives our vectors (see official.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model_store.build.build import build_encoder
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.recipe import recipe_from
from model_store.text.tokenizer import TextTokenizer
from tests.model_store.training.official import BASE, HERE, TEXTS
from tests.tiny import normalized

# As in tests/fidelity: float32 in another order of sums.
TOLERANCE = 1e-5


def our_vectors(folder: Path, stages: list[str]) -> Tensor:
    adapters = [str(HERE / stage) for stage in stages]
    build_encoder(recipe_from("trained", base=str(BASE), adapters=adapters, dtype="float32"), folder)
    encoder = Encoder.load(folder, device="cpu", dtype="float32")
    tokenizer = TextTokenizer.load(folder, encoder.manifest)
    rows = tokenizer.encode_batch([each["text"] for each in TEXTS], [each["instruction"] for each in TEXTS])
    return normalized(encoder.encode(PackedBatch.pack(rows, encoder.manifest.pooling)))


@pytest.mark.parametrize("stages", [["mntp"], ["mntp", "simcse"]])
def test_the_official_library_gives_our_vectors(stages: list[str], tmp_path: Path) -> None:
    official = load_file(HERE / "vectors.safetensors")
    ours = our_vectors(tmp_path / "encoder", stages)
    assert (ours - normalized(official[stages[-1]])).abs().max() < TOLERANCE


def test_the_second_adapter_was_trained_to_some_effect() -> None:
    """A control: were it left out, that would show."""
    official = load_file(HERE / "vectors.safetensors")
    cosines = torch.cosine_similarity(official["mntp"], official["simcse"])
    assert cosines.max() < 0.99
