"""Finished vectors in fewer bits than float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.embedding.choices import EmbedDtype

_LARGEST_FLOAT16 = np.finfo(np.float16).max

# A vector whose largest number is not above this becomes zeros: 127 / _LEAST is the largest float32.
_LEAST = np.float32(127) / np.finfo(np.float32).max


def quantize_vectors(vectors: NDArray[np.float32], dtype: EmbedDtype) -> NDArray[Any]:
    """Vectors that have been cut and normalised, (…, D), in fewer bits, as little-endian numbers.

    Finite vectors stay finite: a number too large for float16 becomes the largest float16. int8 scales each vector by
    itself so that its largest number is ±127, which leaves cosines alone; uint8 adds 128 to int8. ubinary has a bit for
    each number, set if the number is above 0, and packs them from the highest bit down; binary is ubinary less 128.
    """
    match dtype:
        case "float32":
            return vectors.astype("<f4", copy=False)
        case "float16":
            return vectors.clip(-_LARGEST_FLOAT16, _LARGEST_FLOAT16).astype("<f2")
        case "int8":
            largest = np.abs(vectors).max(axis=-1, keepdims=True, initial=0.0)
            scale: NDArray[np.float32] = np.divide(127, largest, out=np.zeros_like(largest), where=largest > _LEAST)
            rounded: NDArray[np.float32] = np.rint(vectors * scale)
            return rounded.astype(np.int8)
        case "uint8":
            return quantize_vectors(vectors, "int8").view(np.uint8) ^ 128
        case "ubinary":
            return np.packbits(vectors > 0, axis=-1)
        case "binary":
            return (np.packbits(vectors > 0, axis=-1) ^ 128).view(np.int8)
