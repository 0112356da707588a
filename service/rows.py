"""What travels from the embedder through the batcher to the device: tokens, and how wide their vector is to be."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model_store.tokenizer import TokenizedText

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class EmbedRow:
    """One text to embed, its vector cut to `width`. Rows with the same `key` get the same vector."""

    text: TokenizedText
    width: int
    key: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", array("I", (self.width, self.text.span_start, *self.text.token_ids)).tobytes())

    def __len__(self) -> int:
        return len(self.text.token_ids)
