"""Whether a text's vector has the same bits in every batch on this CPU, and how far it may move where it has not.

oneDNN (bfloat16) and MKL (float32) choose the kernel of a matrix product by the CPU and by the number of rows, and each
kernel sums in its own order. Measured with the demo model, for texts alone, among 64 others and beside 4096 tokens:

* AMD with AVX-512-bf16: equal bits, in both dtypes.
* Intel with AMX: numbers of the normalised vectors differ by up to 4.9e-3 in bfloat16 (cosine 0.9998 or more) and by
  up to 4e-7 in float32.

No other CPU was measured: those of AMD must have equal bits, all others have the tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

_CPUINFO = Path("/proc/cpuinfo")

# Of one number of a normalised vector as wide as the demo's. The numbers of a narrower one are larger, and move more.
_TOLERANCES = {"bfloat16": 1e-2, "float32": 2e-6}
_WIDTH = 640

# It says little of float32, whose numbers are bounded closely enough.
_LEAST_COSINE = 0.9995


def same_bits_in_any_batch(cpuinfo: str) -> bool:
    """By the text of /proc/cpuinfo."""
    return "AuthenticAMD" in cpuinfo


SAME_BITS = same_bits_in_any_batch(_CPUINFO.read_text() if _CPUINFO.is_file() else "")


def assert_same_vectors(
    found: Any,
    expected: Any,
    dtype: Literal["bfloat16", "float32"],
    what: str = "",
    *,
    same_bits: bool = SAME_BITS,
) -> None:
    """The same vectors, (D,) or (N, D), computed in `dtype` and in two batches: equal, or with the tolerance."""
    left, right = (np.atleast_2d(np.asarray(vectors, dtype=np.float32)) for vectors in (found, expected))
    if same_bits:
        np.testing.assert_array_equal(left, right, err_msg=what)
        return
    assert left.shape == right.shape, what
    lengths = np.linalg.norm(right.astype(np.float64), axis=1, keepdims=True)
    left, right = left / lengths, right / lengths
    tolerance = _TOLERANCES[dtype] * max(_WIDTH / right.shape[1], 1.0) ** 0.5
    np.testing.assert_allclose(left, right, rtol=0, atol=tolerance, err_msg=what)
    cosines = (left * right).sum(1) / np.linalg.norm(left, axis=1)
    assert cosines.min() >= _LEAST_COSINE, f"{what}: cosine {cosines.min()}"
