"""The interface between text tasks and the evaluated model: a server, or an encoder in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# (texts, the instruction before each of them or "") → (n, D) normalised vectors in the texts' order
EmbedTexts = Callable[[Sequence[str], str], NDArray[np.float32]]


class TextVectors(Protocol):
    """(n, D) normalised vectors in the texts' order, for each setting that is compared."""

    def embed(self, texts: Sequence[str], instruction: str = "") -> dict[str, NDArray[np.float32]]: ...


@dataclass(frozen=True)
class ServerVectors:
    """The vectors of a running server, under its own pooling."""

    embed_texts: EmbedTexts

    def embed(self, texts: Sequence[str], instruction: str = "") -> dict[str, NDArray[np.float32]]:
        return {"as served": self.embed_texts(texts, instruction)}
