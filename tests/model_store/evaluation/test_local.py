"""Causal and bidirectional vectors for evaluation, against transformers' own forward of one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model_store.evaluation.local import LocalEncoder
from model_store.pooling_modes import PoolingMode, token_weights
from tests.tiny import FAMILIES, WINDOW, build_tiny, tiny_model

# One token, a few, and several windows long; the tiny tokenizer needs about a token a character.
TEXTS = ["a", "how much protein a day", "A man is playing a flute. " * 4, "the mill"]
POOLINGS: tuple[PoolingMode, ...] = ("mean", "weighted_mean", "last_token")


@torch.inference_mode()
def expected(model: Any, encoder: LocalEncoder, pooling: PoolingMode, **options: Any) -> torch.Tensor:
    """One text at a time through the base itself, pooled by the definition."""
    vectors = []
    for row in encoder.tokenizer.encode_batch(TEXTS, [""] * len(TEXTS)):
        hidden = model(torch.tensor([row.token_ids]), use_cache=False, **options).last_hidden_state[0]
        weights = torch.from_numpy(token_weights(pooling, len(row), row.span_start))
        vectors.append(weights @ hidden)
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_transformers(tmp_path: Path, family: str, causal: bool) -> None:
    build_tiny(tmp_path / "encoder", family)
    model = tiny_model(family, head=True).model
    if family == "mistral":
        model.config.sliding_window = None  # as stored: see Architecture.windowed
    encoder = LocalEncoder.load(tmp_path / "encoder", POOLINGS, "cpu", "float32", causal)
    assert max(map(len, encoder.tokenizer.encode_batch(TEXTS, [""] * len(TEXTS)))) > 2 * WINDOW
    found = encoder.embed(TEXTS)
    for pooling in POOLINGS:
        same = expected(model, encoder, pooling, **({} if causal else {"is_causal": False}))
        torch.testing.assert_close(torch.from_numpy(found[pooling]), same, atol=1e-5, rtol=0)


def test_causal_and_bidirectional_vectors_differ(tmp_path: Path) -> None:
    build_tiny(tmp_path / "encoder")
    causal, both = (LocalEncoder.load(tmp_path / "encoder", (), "cpu", "float32", flag) for flag in (True, False))
    assert abs(causal.embed(TEXTS)["mean"] - both.embed(TEXTS)["mean"]).max() > 1e-2
