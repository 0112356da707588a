"""Embeds texts within a Ray Data pipeline: an encoder in each actor, with the queue and batches of the server.

Usage: `Dataset.map_batches(EmbedBatches, batch_format="pyarrow", ...)`; examples/ray_data_embed.py is a whole job. Ray
Data reads, distributes and writes the rows. There is no manifest: rows that are not written when a job ends must be
computed again.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pyarrow

from service.bulk.job import VECTOR_COLUMN, OnError
from service.bulk.pipeline import embed_window
from service.bulk.reading import BadRow, Columns, InputError, row_of
from service.bulk.shards import as_lists
from service.bulk.sources import LocalVectors, Wanted, warn_of_another_width
from service.embedding.choices import EmbedDtype, Overflow
from service.embedding.vector_dtypes import quantize_vectors
from service.settings import load_settings

ERROR_COLUMN = "error"


class EmbedBatches:
    """Adds the column `embedding` to tables. One actor may work on several tables at once.

    A row that can't be embedded ends the job. With on_error="skip" its vector is null instead, and the column `error`,
    null for the other rows, holds the reason. `settings` are further settings of `serve`, such as `device` and `dtype`.
    """

    def __init__(
        self,
        model: str = "demo",
        text_column: str = "text",
        instruction: str | None = None,
        dimensions: int | None = None,
        overflow: Overflow = "error",
        embed_dtype: EmbedDtype = "float32",
        on_error: OnError = "stop",
        input_type: str | None = None,
        **settings: Any,
    ) -> None:
        wanted = Wanted(instruction, input_type, dimensions or 0, overflow)
        given = load_settings({"model": model, "log_level": "warning", **settings})
        self._vectors = LocalVectors.prepare(given, wanted, lambda done, total: None)
        self._dimensions = dimensions or self._vectors.source.width
        warn_of_another_width(self._vectors.source, self._dimensions)
        self._columns = Columns(text_column)
        self._embed_dtype = embed_dtype
        self._on_error = on_error
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vectors", daemon=True).start()
        self._running = self._vectors.running()  # it runs as long as the actor
        asyncio.run_coroutine_threadsafe(self._running.__aenter__(), self._loop).result()
        self._at_once = asyncio.Semaphore(self._vectors.requests_at_once)

    async def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """The same table with its vectors. It may be called from any event loop.

        Raises:
            InputError: for a row that can't be embedded, with on_error="stop".
            ServiceError: if the device can't go on.
        """
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._embed(table), self._loop))

    async def _embed(self, table: pyarrow.Table) -> pyarrow.Table:
        values = table.column(self._columns.text).to_pylist()
        rows = [row_of(place, {self._columns.text: value}, self._columns) for place, value in enumerate(values)]
        found = await embed_window(
            [(0, row) for row in rows],
            self._vectors,
            self._dimensions,
            self._at_once,
            lambda rows, tokens: None,
        )
        reasons = {row.line: row.reason for row in rows if isinstance(row, BadRow)} | found.refused
        if reasons and self._on_error == "stop":
            place = min(reasons)
            raise InputError(f"the text {values[place]!r:.80}: {reasons[place]}")
        missing = np.isin(np.arange(len(rows)), list(reasons))
        found.of_rows[missing] = 0
        vectors = as_lists(quantize_vectors(found.of_rows, self._embed_dtype), missing)
        table = table.append_column(VECTOR_COLUMN, vectors)
        if self._on_error == "skip":
            why = pyarrow.array([reasons.get(place) for place in range(len(rows))], pyarrow.string())
            table = table.append_column(ERROR_COLUMN, why)
        return table
