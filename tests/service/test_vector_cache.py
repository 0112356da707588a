from __future__ import annotations

import numpy as np

from service.batching.vector_cache import VectorCache


def vector(value: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.full(256, value, np.float32)


def test_remembers_what_was_used_last_within_its_bytes() -> None:
    cache = VectorCache(3 * 1400)  # of 1024 + 256 bytes and a key each
    for number in range(3):
        cache.put(b"%d" % number, vector(number))
    assert cache.get(b"0") is not None  # used, so 1 is the oldest now
    cache.put(b"3", vector(3))
    assert cache.get(b"1") is None
    for number in (0, 2, 3):
        found = cache.get(b"%d" % number)
        assert found is not None
        assert found[0] == number
    assert len(cache) == 3


def test_keeps_its_own_copy() -> None:
    cache = VectorCache(10_000)
    batch = np.stack([vector(1), vector(2)])
    cache.put(b"a", batch[0])
    batch[:] = 9
    found = cache.get(b"a")
    assert found is not None
    assert found[0] == 1
    assert found.base is None


def test_what_is_larger_than_all_of_it_is_not_kept() -> None:
    cache = VectorCache(100)
    cache.put(b"a", vector(1))
    assert len(cache) == 0
