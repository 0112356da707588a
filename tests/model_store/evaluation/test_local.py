"""Causal and bidirectional vectors for evaluation, against transformers' own forward; and the stages of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model_store.build.description import TRAINED_FILE
from model_store.evaluation.local import LocalEncoder, each_stage
from model_store.pooling_modes import PoolingMode, token_weights
from model_store.recipe import Recipe, recipe_from
from tests.cpus import SAME_BITS
from tests.tiny import (
    FAMILIES,
    WINDOW,
    build_tiny,
    normalized,
    padded_vectors,
    save_adapter,
    save_base,
    tiny_model,
)

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


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_transformers(tmp_path: Path, family: str, attention: str) -> None:
    build_tiny(tmp_path / "encoder", family, attention=attention)
    model = tiny_model(family, head=True).model
    if family == "mistral" and attention == "bidirectional":
        model.config.sliding_window = None  # as stored: see Architecture.windowed
    encoder = LocalEncoder.load(tmp_path / "encoder", POOLINGS, "cpu", "float32")
    assert max(map(len, encoder.tokenizer.encode_batch(TEXTS, [""] * len(TEXTS)))) > 2 * WINDOW
    found = encoder.embed(TEXTS)
    for pooling in POOLINGS:
        same = expected(model, encoder, pooling, **({} if attention == "causal" else {"is_causal": False}))
        torch.testing.assert_close(torch.from_numpy(found[pooling]), same, atol=1e-5, rtol=0)


def stages(recipe: Recipe) -> Iterator[tuple[str, LocalEncoder]]:
    load = partial(LocalEncoder.load, poolings=POOLINGS, device="cpu", dtype="float32")
    for name, loaded in each_stage(recipe, load, lambda done, total: None):
        yield name, loaded()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_causal_stage_is_transformers_own_padded_causal_forward(tmp_path: Path, family: str) -> None:
    """The base with all its windows, and nothing merged."""
    model = save_base(tmp_path / "base", family)
    save_adapter(tmp_path / "adapter", tiny_model(family), 1)
    recipe = recipe_from("tiny", base=str(tmp_path / "base"), adapters=(str(tmp_path / "adapter"),), dtype="float32")
    (first, causal), (second, both), _ = stages(recipe)
    assert (first, second) == ("causal", "bidirectional")
    rows = causal.tokenizer.encode_batch(TEXTS, [""] * len(TEXTS))
    model.model.config.is_causal = True
    padded = normalized(padded_vectors(model.model, rows)).numpy()
    assert abs(causal.embed(TEXTS)["mean"] - padded).max() < (3e-7 if SAME_BITS else 1e-5)
    assert abs(both.embed(TEXTS)["mean"] - padded).max() > 1e-3  # a control: the direction counts


def test_the_stages_of_a_causal_encoder(tmp_path: Path) -> None:
    """All of them are causal, whether the recipe says so or the last adapter's own file."""
    save_base(tmp_path / "base")
    adapters = tuple(str(tmp_path / name) for name in ("first", "second"))
    for seed, folder in enumerate(adapters):
        save_adapter(Path(folder), tiny_model("llama"), seed)
    parts: dict[str, Any] = {"base": str(tmp_path / "base"), "adapters": adapters, "dtype": "float32"}
    asked = dict(stages(recipe_from("tiny", **parts, attention="causal")))
    Path(adapters[1], TRAINED_FILE).write_text('{"attention": "causal"}')
    trained = dict(stages(recipe_from("tiny", **parts)))
    assert list(asked) == list(trained) == ["causal", "+ first", "+ second"]
    for name, encoder in trained.items():
        assert encoder.encoder.manifest.attention == "causal"
        assert (encoder.embed(TEXTS)["mean"] == asked[name].embed(TEXTS)["mean"]).all()


def test_texts_without_an_instruction_get_the_encoder_s_own(tmp_path: Path) -> None:
    build_tiny(tmp_path / "encoder", query_instruction="Find:", document_instruction="Read:")
    encoder = LocalEncoder.load(tmp_path / "encoder", (), "cpu", "float32")

    def vectors(*asked: Any) -> NDArray[np.float32]:
        return encoder.embed(TEXTS, *asked)["mean"]

    assert (vectors(None, "query") == vectors("Find:")).all()
    assert (vectors(None, "document") == vectors("Read:")).all()
    assert (vectors() == vectors("", "query")).all()
    assert (vectors("Mine:", "query") == vectors("Mine:")).all()
    assert abs(vectors("Find:") - vectors("")).max() > 1e-2
    assert abs(vectors("Find:") - vectors("Read:")).max() > 1e-2
