"""What is asserted on CPUs other than this one."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from tests.cpus import assert_same_vectors, same_bits_in_any_batch

WIDTH = 640


@pytest.mark.parametrize(("vendor", "equal"), [("AuthenticAMD", True), ("GenuineIntel", False), ("0x41", False)])
def test_the_vendor_decides(vendor: str, equal: bool) -> None:
    assert same_bits_in_any_batch(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: any\n") == equal
    assert not same_bits_in_any_batch("")


@pytest.mark.parametrize(("dtype", "seen", "too_much"), [("bfloat16", 4.9e-3, 1.1e-2), ("float32", 4e-7, 3e-6)])
def test_rounding_passes_where_bits_are_not_the_same_and_more_does_not(
    dtype: Literal["bfloat16", "float32"], seen: float, too_much: float
) -> None:
    vector = np.random.default_rng(0).normal(size=WIDTH)
    vector /= np.linalg.norm(vector)
    for moved, same_bits, passes in ((seen, False, True), (too_much, False, False), (seen, True, False)):
        other = vector.copy()
        other[3] += moved
        if passes:
            assert_same_vectors(other, vector, dtype, same_bits=same_bits)
            assert_same_vectors(70 * other, 70 * vector, dtype, same_bits=same_bits)
        else:
            with pytest.raises(AssertionError):
                assert_same_vectors(other, vector, dtype, same_bits=same_bits)
    with pytest.raises(AssertionError, match="cosine"):  # small steps, but by all numbers
        assert_same_vectors(vector + 2e-3 * np.sign(vector[::-1]), vector, "bfloat16", same_bits=False)
