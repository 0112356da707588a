"""The rows that travel from the embedder through the batcher to the device: tokens, and the width of their vector."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model_store.text.tokenizer import TokenizedText

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class EmbedRow:
    """One text to embed. Rows with the same `key` get the same vector.

    Its vector is cut to `width`, and scaled to length 1 if `normalize` is set. A text with spans gets a vector for each
    of them, of shape (spans, width).
    """

    text: TokenizedText
    width: int
    normalize: bool = True
    key: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        text = self.text
        bounds = [bound for span in text.spans for bound in span]
        head = (self.width << 1 | self.normalize, text.span_start, len(bounds))
        object.__setattr__(self, "key", array("I", (*head, *bounds, *text.token_ids)).tobytes())

    @classmethod
    def from_key(cls, key: bytes) -> EmbedRow:
        """The row with this key; a key holds everything that computing a row needs."""
        numbers = array("I", key).tolist()
        how, span_start, count = numbers[:3]
        bounds = iter(numbers[3 : 3 + count])
        spans = tuple(zip(bounds, bounds, strict=True))
        return cls(TokenizedText(numbers[3 + count :], span_start, spans=spans), how >> 1, bool(how & 1))

    def __len__(self) -> int:
        return len(self.text.token_ids)
