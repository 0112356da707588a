"""The golden fixtures, and our own vectors of the same inputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model_store.build.build import build_encoder
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.recipe import recipe_from
from model_store.text.tokenizer import TextTokenizer, TokenizedText
from tests.tiny import normalized

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = tuple(sorted(path.name for path in GOLDEN.iterdir()))


@dataclass(frozen=True)
class Golden:
    """What the official library made of one family's checkpoint."""

    family: str
    document: dict[str, Any]
    vectors: dict[str, Tensor]

    @property
    def folder(self) -> Path:
        """The checkpoints: base, mntp, second."""
        return GOLDEN / self.family

    @property
    def texts(self) -> list[str]:
        """The inputs' texts."""
        return [given["text"] for given in self.document["inputs"]]

    @property
    def instructions(self) -> list[str]:
        """The inputs' instructions, "" for none."""
        return [given["instruction"] for given in self.document["inputs"]]

    def truths(self) -> list[str]:
        """The tensors that ours must equal: one for each pooling, and the mean of the whole row."""
        return [name for name, about in self.document["tensors"].items() if not about["control"]]

    def rows(self, tensor: str) -> list[dict[str, Any]]:
        """Token ids, pooled count and whether something was cut, for each input."""
        rows: list[dict[str, Any]] = self.document["rows"][self.document["tensors"][tensor]["rows"]]
        return rows


@cache
def golden(family: str) -> Golden:
    """One family's fixtures."""
    folder = GOLDEN / family
    return Golden(family, json.loads((folder / "vectors.json").read_text()), load_file(folder / "vectors.safetensors"))


def build_like(
    one: Golden,
    tensor: str,
    folder: Path,
    dtype: str = "float32",
    stages: Any = ("mntp", "second"),
    attention: str | None = None,
) -> None:
    """Build the encoder that must give a golden tensor, through the product's own `build`."""
    about = one.document["tensors"][tensor]
    recipe = recipe_from(
        f"{one.family}-{tensor}",
        base=str(one.folder / "base"),
        adapters=[str(one.folder / stage) for stage in stages],
        pooling=about["pooling"],
        skip_instruction=about["skip_instruction"],
        max_length=one.document["max_length"],
        doc_max_length=one.document["doc_max_length"],
        dtype=dtype,
        attention=attention,
    )
    build_encoder(recipe, folder)


def tokenize(folder: Path, one: Golden, reference: bool) -> list[TokenizedText]:
    """The inputs' rows as the stored encoder in `folder` makes them."""
    encoder_tokenizer = TextTokenizer.load(folder, Encoder.load(folder, device="cpu").manifest, reference)
    return encoder_tokenizer.encode_batch(one.texts, one.instructions)


def encode(folder: Path, rows: list[TokenizedText], dtype: Any = "float32") -> Tensor:
    """(B, D) normalised float32 vectors of rows, in one packed batch."""
    encoder = Encoder.load(folder, device="cpu", dtype=dtype)
    encoder.pack_weights()  # as the server does
    return normalized(encoder.encode(PackedBatch.pack(rows, encoder.manifest.pooling)))


def comparable(one: Golden, tensor: str, uncut_only: bool) -> Tensor:
    """(inputs,) bool: which rows to compare.

    Where a text was cut to nothing, the official weighted mean is the zero vector, which has no direction.
    """
    rows = one.rows(tensor)
    empty = [row["n"] == 0 and tensor == "weighted_mean" for row in rows]
    return torch.tensor([not (gone or (uncut_only and row["cut"])) for row, gone in zip(rows, empty, strict=True)])
