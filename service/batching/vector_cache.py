"""Recent vectors by what was embedded, so that texts asked for again and again cost nothing. Off unless given room."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

# What an entry takes beside its key and vector: the dictionary's slot, and the objects' own headers.
_ENTRY_BYTES = 256


class VectorCache:
    """The vectors used last, within so many bytes. For one thread."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._vectors: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The vector, if it is remembered; it is the newest then."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: bytes, vector: NDArray[np.float32]) -> None:
        """Remember a vector, and forget those unused for longest where it takes too much room."""
        if key in self._vectors:
            return
        self._vectors[key] = vector.copy()  # a batch's vectors share one array, which one of them would keep
        self._bytes += self._size(key, vector)
        while self._bytes > self._most_bytes:
            self._bytes -= self._size(*self._vectors.popitem(last=False))

    def __len__(self) -> int:
        return len(self._vectors)

    @staticmethod
    def _size(key: bytes, vector: NDArray[np.float32]) -> int:
        return len(key) + vector.nbytes + _ENTRY_BYTES
