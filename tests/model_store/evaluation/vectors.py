"""Text vectors that need no model: bags of hashed words."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model_store.manifest import Role
from model_store.text.prompts import EncoderPrompts, load_prompts

WIDTH = 64


class HashedVectors:
    """Each word counts in one of 64 dimensions; remembers what it was asked for."""

    def __init__(self, prompts: EncoderPrompts | None = None) -> None:
        self.prompts = prompts or EncoderPrompts(load_prompts())
        self.asked: list[tuple[list[str], str | None, Role | None]] = []

    def embed(
        self, texts: Sequence[str], instruction: str | None = None, role: Role | None = None
    ) -> dict[str, NDArray[np.float32]]:
        self.asked.append((list(texts), instruction, role))
        vectors = np.full((len(texts), WIDTH), 1e-3, dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.lower().split():
                row[zlib.crc32(word.encode()) % WIDTH] += 1
        return {"hashed": vectors / np.linalg.norm(vectors, axis=1, keepdims=True)}
