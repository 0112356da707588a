"""Rows in, shards out, in the rows' order: reading ahead, asking for many vectors at once, writing aside.

Rows are taken in windows. Within one the longest texts go first, in requests of texts of about the same length, and
the next windows' wait behind them, so that whatever computes the vectors never waits for files. At most three windows
and two shards are in memory, whatever the size of the inputs.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.bulk.asked import OnError
from service.bulk.folder import JobFolder
from service.bulk.gather import gather_all
from service.bulk.job import Job, JobError, VectorSource, bad_row, state_of
from service.bulk.reading import BadRow, Columns, Input, Row
from service.bulk.shards import ShardRows, ShardWriter
from service.embedding.vector_dtypes import quantize_vectors
from service.errors import EncodingError, InvalidRequest

# B texts, D dimensions

# How messages about a request name the first of its inputs, where only one was asked for.
_THE_ONLY_ONE = re.compile(r" (?:\(input index 0\)|(?:at |of )?(?:input )?index 0\b)")

# (input texts that were done, tokens that they had)
OnDone = Callable[[int, int], None]


@dataclass(frozen=True)
class Embedded:
    """(B, D) float32 vectors of length 1, and the tokens that were computed for them."""

    vectors: NDArray[np.float32]
    tokens: int


@dataclass(frozen=True)
class Sizes:
    """What a window and a request hold at most, and the windows under way beside the one that is taken next."""

    window_rows: int = 4096
    window_characters: int = 1 << 22
    request_texts: int = 64
    request_characters: int = 1 << 16
    windows_ahead: int = 2


SIZES = Sizes()


class Embeds(Protocol):
    """What makes vectors of texts: an encoder in this process, or a server."""

    @property
    def source(self) -> VectorSource:
        """What the vectors are; known before anything is started."""

    @property
    def requests_at_once(self) -> int:
        """How many requests keep it busy; known while it is running."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """While this is entered it can be asked."""

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """The texts' vectors.

        Raises:
            InvalidRequest, EncodingError: if one of the texts is to blame; the others may be asked for again.
            ServiceError: if it can't go on.
        """


@dataclass(frozen=True)
class Window:
    """Consecutive rows, each with the number of its input, and in the end their vectors or why there is none."""

    rows: Sequence[tuple[int, Row | BadRow]]

    @property
    def texts(self) -> dict[int, str]:
        """By place in the window."""
        return {place: row.text for place, (_, row) in enumerate(self.rows) if isinstance(row, Row)}


@dataclass
class Vectors:
    """A window's: (rows, D) float32, those of `refused` rows without meaning, with the reason for each."""

    of_rows: NDArray[np.float32]
    refused: dict[int, str] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class Position:
    """Where to go on: behind a line of one of the inputs."""

    input: int = 0
    line: int = 0


async def run(
    job: Job,
    inputs: Sequence[Input],
    folder: JobFolder,
    embeds: Embeds,
    on_error: OnError,
    on_done: OnDone,
    sizes: Sizes = SIZES,
) -> None:
    """Do what is left of a job that has begun in `folder`; `on_done` is told of texts as they are done, in any order.

    Raises:
        InputError: for a bad row if that is to stop the job, or a file that can't be read.
        JobError: if an input was changed meanwhile.
        ServiceError: if the vectors can't be had; the same job can be gone on with later.
    """
    manifest = folder.manifest
    assert manifest is not None, "begin comes first"
    last = manifest.shards[-1] if manifest.shards else None
    position = Position(last.input, last.line) if last else Position()
    writer = ShardWriter(job, inputs)
    windows = take_windows(rows_behind(inputs, job.columns, position), job.rows_per_shard, sizes)
    filling = _Filling(job, inputs, on_error, manifest.read)
    writing: asyncio.Task[Any] | None = None
    try:
        async with aclosing(embedded(windows, embeds, job.dimensions, on_done, sizes)) as done:
            async for window, vectors in done:
                filling.add(window, vectors)
                if filling.read == job.rows_per_shard:
                    if writing:
                        await writing
                    writing = asyncio.create_task(asyncio.to_thread(folder.add, *filling.taken(), writer))
    finally:
        if writing:
            await writing
    if filling.read:
        await asyncio.to_thread(folder.add, *filling.taken(), writer)
    if changed := [one.path for one, was in zip(inputs, job.inputs, strict=True) if state_of(one) != was.state]:
        raise JobError(f"{changed[0]} was changed while it was embedded: begin anew with --overwrite")
    folder.finish()


def rows_behind(inputs: Sequence[Input], columns: Columns, position: Position) -> Iterator[tuple[int, Row | BadRow]]:
    """The rows behind a position, each with the number of its input."""
    for number in range(position.input, len(inputs)):
        after = position.line if number == position.input else 0
        for row in inputs[number].read(columns, after):
            yield number, row


def take_windows(
    rows: Iterator[tuple[int, Row | BadRow]], rows_per_shard: int, sizes: Sizes = SIZES
) -> Iterator[Window]:
    """Windows, of which each ends within a shard or with it."""
    left, taken, characters = rows_per_shard, [], 0
    for number, row in rows:
        taken.append((number, row))
        characters += len(row.text) if isinstance(row, Row) else 0
        if len(taken) == min(left, sizes.window_rows) or characters >= sizes.window_characters:
            yield Window(taken)
            left = (left - len(taken)) or rows_per_shard
            taken, characters = [], 0
    if taken:
        yield Window(taken)


async def embedded(
    windows: Iterator[Window], embeds: Embeds, dimensions: int, on_done: OnDone, sizes: Sizes = SIZES
) -> AsyncGenerator[tuple[Window, Vectors], None]:
    """The windows in order, with their vectors, while those behind them are read and computed."""
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
    """A window's vectors; no more than `at_once` requests are on their way.

    Raises:
        ServiceError: if they can't be had.
    """
    texts = window.texts
    vectors = Vectors(np.empty((len(window.rows), dimensions), np.float32))

    async def fill(places: Sequence[int]) -> None:
        """Ask for these, in halves if one of them is to blame, down to that one."""
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
    on_done(len(window.rows) - len(texts), 0)
    return vectors


def reason_of(error: Exception) -> str:
    """What is wrong with the only text of a request, without its place there: that is not its row."""
    return _THE_ONLY_ONE.sub("", str(error))


def requests_of(texts: dict[int, str], sizes: Sizes = SIZES) -> Iterator[list[int]]:
    """The places of texts, in requests: the longest first, so that if memory fails it does at once."""
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


class _Filling:
    """The shard that rows are added to, in their order."""

    def __init__(self, job: Job, inputs: Sequence[Input], on_error: OnError, first_row: int) -> None:
        self._job = job
        self._inputs = inputs
        self._on_error = on_error
        self._next_row = first_row
        self._begin()

    def _begin(self) -> None:
        self.read = 0
        self._numbers: list[int] = []
        self._values: list[tuple[Any, ...]] = []
        self._vectors: list[NDArray[Any]] = []
        self._errors: list[dict[str, Any]] = []
        self._tokens = 0
        self._end = Position()

    def add(self, window: Window, vectors: Vectors) -> None:
        """Add a window.

        Raises:
            InputError: for a bad row, if that is to stop the job.
        """
        good = []
        for place, (number, row) in enumerate(window.rows):
            if place in vectors.refused:
                row = BadRow(row.line, vectors.refused[place])
            if isinstance(row, BadRow):
                self._leave_out(number, row)
            else:
                good.append(place)
                self._numbers.append(self._next_row)
                self._values.append(row.values)
            self._next_row += 1
            self._end = Position(number, row.line)
        self._vectors.append(quantize_vectors(vectors.of_rows[good], self._job.embed_dtype))
        self._tokens += vectors.tokens
        self.read += len(window.rows)

    def taken(self) -> tuple[ShardRows, list[dict[str, Any]]]:
        """What was added since the last time, and the rows that were left out of it."""
        rows = ShardRows(
            self._numbers,
            self._values,
            np.concatenate(self._vectors),
            self.read,
            self._tokens,
            self._end.input,
            self._end.line,
        )
        errors = self._errors
        self._begin()
        return rows, errors

    def _leave_out(self, number: int, row: BadRow) -> None:
        one = self._inputs[number]
        if self._on_error == "stop":
            raise bad_row(one, row)
        path, line = one.place(row.line)
        self._errors.append({"row": self._next_row, "file": str(path), "line": line, "reason": row.reason})
