"""RoPE whose frequencies depend on the length of a row: such encoders read only what their batch mates can't move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from model_store.build.build import build_encoder
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.manifest import Manifest
from model_store.recipe import recipe_from
from model_store.rope import RopeError, limited_by, readable_positions
from service.cli import main
from tests.tiny import normalized, padded_vectors, random_rows, save_base

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "reads", "limit"),
    [
        ({}, 4096, ""),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 4096, ""),
        ({"rope_scaling": LONGROPE, "original_max_position_embeddings": 512}, 512, "longrope"),
        ({"rope_scaling": {**LONGROPE, "type": "su"}, "original_max_position_embeddings": 512}, 512, "longrope"),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64}}, 64, "longrope"),
        ({"rope_parameters": {"a": {"rope_type": "default"}, "b": {"rope_type": "linear"}}}, 4096, ""),
        ({"rope_scaling": DYNAMIC}, 4096, ""),  # beyond them it would change, and nothing beyond them is read
        ({"rope_scaling": None, "rope_parameters": None}, 4096, ""),
    ],
)
def test_how_much_can_be_read(config: dict[str, Any], reads: int, limit: str) -> None:
    config = {"max_position_embeddings": 4096, **config}
    assert readable_positions(config) == reads
    assert limited_by(config) == limit


def build(folder: Path, family: str, **changes: Any) -> Manifest:
    """A stored encoder of a base with changes to its config.json."""
    base = folder.parent / f"{folder.name}-base"
    save_base(base, family)
    file = base / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    if "rope_scaling" in changes:
        config.pop("rope_parameters", None)
    file.write_text(json.dumps(config))
    return build_encoder(recipe_from(folder.name, base=str(base), dtype="float32"), folder)


def vectors(encoder: Encoder, lengths: list[int]) -> torch.Tensor:
    return normalized(encoder.encode(PackedBatch.pack(random_rows(lengths), "mean")))


def test_longrope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "encoder"
    manifest = build(folder, "phi3", rope_scaling=LONGROPE, original_max_position_embeddings=32)
    assert manifest.max_positions == 32
    assert main(["show", str(folder)]) == 0
    assert (
        "32 tokens (its base reads more: beyond them longrope RoPE would depend on batch mates)"
        in capsys.readouterr().out
    )

    encoder = Encoder.load(folder, "cpu", "float32")
    among = vectors(encoder, [20, 32, 7])
    # Here is what the frequencies of long rows would do to a short one: transformers chooses them for the whole batch.
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    alone = torch.cat([normalized(padded_vectors(model, [row])) for row in random_rows([20, 32, 7])])
    torch.testing.assert_close(among, alone, rtol=0, atol=1e-5)
    beside_a_long_one = normalized(padded_vectors(model, random_rows([20, 40])))[0]
    assert beside_a_long_one @ alone[0] < 0.999


def test_dynamic(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    assert build(folder, "llama", rope_scaling=DYNAMIC, max_position_embeddings=64).max_positions == 64
    encoder = Encoder.load(folder, "cpu", "float32")
    alone = vectors(encoder, [20])
    torch.testing.assert_close(vectors(encoder, [20, 64])[:1], alone, rtol=0, atol=1e-5)


def test_a_folder_that_was_built_to_read_more_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    manifest = build(folder, "phi3", rope_scaling=LONGROPE, original_max_position_embeddings=32)
    manifest.model_copy(update={"max_positions": 512}).sealed(folder).write(folder)
    with pytest.raises(RopeError, match=r"reads 512 tokens, but beyond 32 .*: build it again"):
        Encoder.load(folder, "cpu", "float32")
