"""Vectors in fewer bits: whatever is finite stays so."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from service.embedding.choices import EmbedDtype
from service.embedding.vector_dtypes import quantize_vectors


@pytest.mark.parametrize("dtype", get_args(EmbedDtype))
@pytest.mark.parametrize("size", [0.0, 1e-45, 3e-37, 4e-37, 1.0, 65_510.0, 1e6, 3.4e38])
def test_every_finite_vector_has_finite_numbers(dtype: EmbedDtype, size: float) -> None:
    """With numpy's warnings as errors: a division by zero or a number too large for its type would be one."""
    vectors = np.array([[size, -size, 0.0, size / 2, 1e-9, 0.0, 0.0, 0.0]], dtype=np.float32)
    assert np.isfinite(quantize_vectors(vectors, dtype)).all()


def test_a_vector_of_zeros_stays_one() -> None:
    zeros = np.zeros((1, 8), dtype=np.float32)
    assert not quantize_vectors(zeros, "int8").any()
    assert (quantize_vectors(zeros, "uint8") == 128).all()
