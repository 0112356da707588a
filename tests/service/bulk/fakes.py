"""What stands in for an encoder: vectors that follow from their text, at once or a little later."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.bulk.folder import JobFolder
from service.bulk.job import FileFormat, Job, Manifest, OnError, VectorSource, describe
from service.bulk.pipeline import Embedded, Embeds, Sizes, run
from service.bulk.reading import Columns, Input
from service.errors import InvalidRequest, Unavailable

WIDTH = 8

TEXTS = Columns()

# So that a few rows are many windows and requests.
SMALL = Sizes(window_rows=7, window_characters=400, request_texts=3, request_characters=150)

# A text that gets no vector.
REFUSED = "<refused>"


class FakeVectors:
    """Answers after up to `most_seconds`, in any order, and fails after so many requests; remembers them."""

    def __init__(self, most_seconds: float = 0.0, space: str = "fake", fails_after: float = float("inf")) -> None:
        self.source = VectorSource(model="fake", embedding_space=space, width=WIDTH, max_input_tokens=512)
        self.requests_at_once = 4
        self.requests: list[list[str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._fails_after = fails_after
        self._most_seconds = most_seconds
        self._chance = random.Random(0)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    async def embed(self, texts: Sequence[str]) -> Embedded:
        self.requests.append(list(texts))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(self._chance.uniform(0, self._most_seconds))
        finally:
            self._at_once -= 1
        if len(self.requests) > self._fails_after:
            raise Unavailable("the device is gone")
        if REFUSED in texts:
            raise InvalidRequest("it is refused")
        return Embedded(np.stack([expected(text) for text in texts]), sum(map(len, texts)))


def expected(text: str) -> NDArray[np.float32]:
    """The vector that a text gets."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    vector = np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)
    normalized: NDArray[np.float32] = vector / np.linalg.norm(vector)
    return normalized


def do_job(
    inputs: Sequence[Input],
    out: Path,
    vectors: Embeds,
    columns: Columns = TEXTS,
    rows_per_shard: int = 10,
    on_error: OnError = "stop",
    file_format: FileFormat = "parquet",
    overwrite: bool = False,
) -> Manifest:
    """A whole job, or what is left of it."""
    with JobFolder.alone(out) as folder:
        known = folder.manifest.job.inputs if folder.manifest else ()
        job = Job(
            source=vectors.source,
            instruction="",
            dimensions=WIDTH,
            overflow="error",
            embed_dtype="float32",
            text_column=columns.text,
            id_column=columns.id,
            carried=columns.carried,
            file_format=file_format,
            rows_per_shard=rows_per_shard,
            inputs=describe(inputs, columns, on_error, known),
        )
        if not folder.begin(job, overwrite).complete:

            async def work() -> None:
                async with vectors.running():
                    await run(job, inputs, folder, vectors, on_error, lambda rows, tokens: None, SMALL)

            asyncio.run(work())
        assert folder.manifest is not None
        return folder.manifest
