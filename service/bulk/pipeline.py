"""Rows in, shards out, in the rows' order. It reads ahead, asks for many vectors at once, and writes in the background.

Rows are taken in windows. Within a window the longest texts go first, in requests of texts of about the same length.
The requests of the next windows wait behind them, so that the source of the vectors never waits for files. At most
three windows and two shards are in memory, whatever the size of the inputs.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.bulk.folder import JobFolder
from service.bulk.job import Job, JobError, OnError, Shard, VectorSource, bad_row, state_of
from service.bulk.reading import BadRow, Columns, Input, Row
from service.bulk.shards import ShardRows, ShardWriter
from service.embedding.vector_dtypes import quantize_vectors
from service.errors import EncodingError, InvalidRequest

T = TypeVar("T")

# B texts, D dimensions

# The words with which an error message names the only input of a request.
_THE_ONLY_ONE = re.compile(r" (?:\(input index 0\)|(?:at |of )?(?:input )?index 0\b)")

# A row with the number of its input, and consecutive such rows.
Numbered = tuple[int, Row | BadRow]
Window = Sequence[Numbered]

# Arguments: the number of texts done, and of their tokens.
OnDone = Callable[[int, int], None]


@dataclass(frozen=True)
class Embedded:
    """(B, D) float32 vectors of length 1, and the tokens that were computed for them."""

    vectors: NDArray[np.float32]
    tokens: int


@dataclass(frozen=True)
class Sizes:
    """The most that a window and a request hold, and the number of windows under way besides the next one taken."""

    window_rows: int = 4096
    window_characters: int = 1 << 22
    request_texts: int = 64
    request_characters: int = 1 << 16
    windows_ahead: int = 2


SIZES = Sizes()


class Embeds(Protocol):
    """A source of vectors: an encoder in this process, or a server."""

    @property
    def source(self) -> VectorSource:
        """The description of the vectors' source; known before anything is started."""

    @property
    def requests_at_once(self) -> int:
        """How many requests keep the source busy; known while it is running."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Run the source: it can be asked within this context."""

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """The texts' vectors.

        Raises:
            InvalidRequest, EncodingError: if one of the texts is to blame; the others may be sent again.
            ServiceError: if the source can't go on.
        """


@dataclass
class Vectors:
    """A window's (rows, D) float32 vectors. `refused` rows have a reason instead, and no meaning in `of_rows`."""

    of_rows: NDArray[np.float32]
    refused: dict[int, str] = field(default_factory=dict)
    tokens: int = 0


async def run(
    job: Job,
    inputs: Sequence[Input],
    folder: JobFolder,
    embeds: Embeds,
    on_error: OnError,
    on_done: OnDone,
    sizes: Sizes = SIZES,
) -> None:
    """Do the rest of a job that has begun in `folder`. `on_done` is told of texts when they are done, in any order.

    Raises:
        InputError: for a bad row if bad rows stop the job, or a file that can't be read.
        JobError: if an input was changed during the job.
        ServiceError: if the vectors can't be computed; the job can be continued later.
    """
    manifest = folder.manifest
    assert manifest is not None, "begin comes first"
    writer = ShardWriter(job, inputs)
    rows = rows_behind(inputs, job.columns, manifest.shards[-1] if manifest.shards else None)
    windows = take_windows(rows, job.rows_per_shard, sizes)
    shard = ShardRows(manifest.read)
    writing: asyncio.Task[Any] | None = None
    try:
        async with aclosing(embedded(windows, embeds, job.dimensions, on_done, sizes)) as done:
            async for window, vectors in done:
                _fill(shard, window, vectors, job, inputs, on_error)
                if shard.read == job.rows_per_shard:
                    if writing:
                        await writing
                    writing = asyncio.create_task(asyncio.to_thread(folder.add, shard, writer))
                    shard = ShardRows(shard.first_row + shard.read)
    finally:
        if writing:
            await writing
    if shard.read:
        await asyncio.to_thread(folder.add, shard, writer)
    if changed := [one.path for one, was in zip(inputs, job.inputs, strict=True) if state_of(one) != was.state]:
        raise JobError(f"{changed[0]} was changed while it was embedded: begin anew with --overwrite")
    folder.finish()


def rows_behind(inputs: Sequence[Input], columns: Columns, last: Shard | None) -> Iterator[Numbered]:
    """The rows after those of the last shard, each with the number of its input."""
    first, line = (last.input, last.line) if last else (0, 0)
    for number in range(first, len(inputs)):
        for row in inputs[number].read(columns, line if number == first else 0):
            yield number, row


def take_windows(rows: Iterator[Numbered], rows_per_shard: int, sizes: Sizes = SIZES) -> Iterator[Window]:
    """Divide rows into windows. No window crosses the end of a shard."""
    left, taken, characters = rows_per_shard, [], 0
    for number, row in rows:
        taken.append((number, row))
        characters += len(row.text) if isinstance(row, Row) else 0
        if len(taken) == min(left, sizes.window_rows) or characters >= sizes.window_characters:
            yield taken
            left = (left - len(taken)) or rows_per_shard
            taken, characters = [], 0
    if taken:
        yield taken


async def embedded(
    windows: Iterator[Window], embeds: Embeds, dimensions: int, on_done: OnDone, sizes: Sizes = SIZES
) -> AsyncGenerator[tuple[Window, Vectors], None]:
    """The windows in order, with their vectors. Later windows are read and computed meanwhile."""
    at_once = asyncio.Semaphore(embeds.requests_at_once)
    ahead: deque[tuple[Window, asyncio.Task[Vectors]]] = deque()
    more = True
    try:
        while True:
            while more and len(ahead) <= sizes.windows_ahead:
                window = await asyncio.to_thread(next, windows, None)
                if more := window is not None:
                    task = asyncio.create_task(embed_window(window, embeds, dimensions, at_once, on_done, sizes))
                    ahead.append((window, task))
            if not ahead:
                return
            window, task = ahead.popleft()
            yield window, await task
    finally:
        for _, task in ahead:
            task.cancel()
        for _, task in ahead:
            with suppress(asyncio.CancelledError, Exception):
                await task


async def embed_window(
    window: Window,
    embeds: Embeds,
    dimensions: int,
    at_once: asyncio.Semaphore,
    on_done: OnDone,
    sizes: Sizes = SIZES,
) -> Vectors:
    """A window's vectors; no more than `at_once` requests are on their way."""
    texts = {place: row.text for place, (_, row) in enumerate(window) if isinstance(row, Row)}
    vectors = Vectors(np.empty((len(window), dimensions), np.float32))

    async def fill(places: Sequence[int]) -> None:
        """Ask for these texts. If one of them is to blame, ask for halves, down to that text."""
        try:
            async with at_once:
                found = await embeds.embed([texts[place] for place in places])
        except (InvalidRequest, EncodingError) as error:
            if len(places) == 1:
                vectors.refused[places[0]] = reason_of(error)
                on_done(1, 0)
                return
            half = len(places) // 2
            await fill(places[:half])
            await fill(places[half:])
        else:
            vectors.of_rows[list(places)] = found.vectors
            vectors.tokens += found.tokens
            on_done(len(places), found.tokens)

    await gather_all(map(fill, requests_of(texts, sizes)))
    on_done(len(window) - len(texts), 0)
    return vectors


async def gather_all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The coroutines' results, in order. If one raises, or this is cancelled, the others are cancelled too.

    Unlike a TaskGroup, it raises the error itself and not a group of errors.
    """
    tasks = [asyncio.create_task(one) for one in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def reason_of(error: Exception) -> str:
    """The error message of a request's only text, without its index there, which is not its row number."""
    return _THE_ONLY_ONE.sub("", str(error))


def requests_of(texts: dict[int, str], sizes: Sizes = SIZES) -> Iterator[list[int]]:
    """Divide the places of texts into requests, the longest texts first, so that a lack of memory shows at once."""
    taken: list[int] = []
    characters = 0
    for place in sorted(texts, key=lambda place: -len(texts[place])):
        full = len(taken) == sizes.request_texts or characters + len(texts[place]) > sizes.request_characters
        if taken and full:
            yield taken
            taken, characters = [], 0
        taken.append(place)
        characters += len(texts[place])
    if taken:
        yield taken


def _fill(
    shard: ShardRows, window: Window, vectors: Vectors, job: Job, inputs: Sequence[Input], on_error: OnError
) -> None:
    good = []
    for place, (number, row) in enumerate(window):
        row_number = shard.first_row + shard.read
        if place in vectors.refused:
            row = BadRow(row.line, vectors.refused[place])
        if isinstance(row, Row):
            good.append(place)
            shard.numbers.append(row_number)
            shard.values.append(row.values)
        elif on_error == "stop":
            raise bad_row(inputs[number], row)
        else:
            path, line = inputs[number].place(row.line)
            shard.errors.append({"row": row_number, "file": str(path), "line": line, "reason": row.reason})
        shard.read += 1
        shard.input, shard.line = number, row.line
    shard.vectors.append(quantize_vectors(vectors.of_rows[good], job.embed_dtype))
    shard.tokens += vectors.tokens
