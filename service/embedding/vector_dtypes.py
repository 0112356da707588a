"""Finished vectors in fewer bits than float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.embedding.choices import EmbedDtype

_LARGEST_FLOAT16 = np.finfo(np.float16).max

# A vector without a number above this is one of zeros: 127 / _LEAST is the largest float32.
_LEAST = np.float32(127) / np.finfo(np.float32).max


def quantize_vectors(vectors: NDArray[np.float32], dtype: EmbedDtype) -> NDArray[Any]:
    """Vectors that have been cut and normalised, (…, D), in fewer bits, as little-endian numbers.

    All of them are finite if the vectors are: in float16 a number that is too large becomes its largest one.
    int8 is scaled so that the largest number is ±127: for each vector by itself, which its cosines don't see; uint8 is
    that and 128. ubinary is a bit for each number, set where it is above 0, packed from the highest bit down; binary is
    that less 128.
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
