"""Recent vectors by their row's key, so that texts that come again and again cost nothing. Off by default."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

# Memory of an entry beside its key and vector: the dictionary's slot, and the objects' own headers.
_ENTRY_BYTES = 256


class VectorCache:
    """The most recently used vectors, within a number of bytes. For one thread only."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._vectors: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The vector of this key, or None. It then counts as the newest."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: bytes, vector: NDArray[np.float32]) -> None:
        """Remember a vector, and forget the least recently used ones if the room is exceeded."""
        if key in self._vectors:
            return
        # A batch's vectors share one array: without a copy one vector would keep all of it in memory.
        self._vectors[key] = vector.copy()
        self._bytes += self._size(key, vector)
        while self._bytes > self._most_bytes:
            self._bytes -= self._size(*self._vectors.popitem(last=False))

    def __len__(self) -> int:
        return len(self._vectors)

    @staticmethod
    def _size(key: bytes, vector: NDArray[np.float32]) -> int:
        return len(key) + vector.nbytes + _ENTRY_BYTES
