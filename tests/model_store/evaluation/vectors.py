"""Text vectors that need no model: bags of hashed words."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WIDTH = 64


class HashedVectors:
    """Each word counts in one of 64 dimensions; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], str]] = []

    def embed(self, texts: Sequence[str], instruction: str = "") -> dict[str, NDArray[np.float32]]:
        self.asked.append((list(texts), instruction))
        vectors = np.full((len(texts), WIDTH), 1e-3, dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.lower().split():
                row[zlib.crc32(word.encode()) % WIDTH] += 1
        return {"hashed": vectors / np.linalg.norm(vectors, axis=1, keepdims=True)}
