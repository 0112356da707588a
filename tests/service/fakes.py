"""Stand-ins for the tokenizer and the device, and the application over them: all of it is tried in milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient

from model_store.manifest import Manifest, SourceRecord
from model_store.recipe import Recipe
from model_store.templates import Template
from model_store.text.tokenizer import Part, TokenizationError, TokenizedText
from service.batching.contract import DevicePlan
from service.batching.cost_model import CostModel
from service.batching.limits import Limits
from service.device.backend import LocalBackend
from service.embedding.backend import Served
from service.embedding.rows import EmbedRow, Vector
from service.errors import EncodingError, NonFiniteEmbedding, OutOfMemory
from service.metrics import Metrics
from service.server.app import create_app
from service.settings import Settings
from service.tracing import Traces

WIDTH = 8

# The fake tokenizer's ids: a character each.
CHARACTERS = 0x110000

# A device that is done at once.
COST = CostModel(floor=1e-6, base=1e-6, per_token=1e-9)

# Texts that make the fakes misbehave.
NO_TOKENS = "<no tokens>"
BREAKS_THE_BATCH = "<breaks the batch>"
OUT_OF_MEMORY = "<out of memory>"
NOT_FINITE = "<not finite>"
NOT_FINITE_IN_COMPANY = "<not finite in company>"
OUT_OF_MEMORY_IN_COMPANY = "<out of memory in company>"
HANGS = "<hangs>"


def fake_manifest(max_positions: int = 512) -> Manifest:
    recipe = Recipe(name="fake", base="fake")
    return Manifest(
        name="fake",
        model_type="llama",
        width=WIDTH,
        max_positions=max_positions,
        vocabulary=CHARACTERS,
        parameters=1,
        dtype="float32",
        base=SourceRecord(reference="fake"),
        adapters=(),
        tokenizer="fake",
        template=Template(),
        pooling="mean",
        skip_instruction=True,
        max_length=512,
        doc_max_length=400,
        query_instruction="Find:",
        recipe=recipe,
        recipe_fingerprint=recipe.fingerprint,
        tools={},
        files={},
        embedding_space="00112233445566aa",
    )


class FakeTokenizer:
    """A token a character, with one for BOS."""

    characters_per_token: int | None = None  # as of a tokenizer about which nothing is known

    def encode_batch(self, texts: Sequence[str | Sequence[int]], instructions: Sequence[str]) -> list[TokenizedText]:
        if NO_TOKENS in texts:
            raise TokenizationError("the text has no tokens", texts.index(NO_TOKENS))
        rows: list[TokenizedText] = []
        for text, instruction in zip(texts, instructions, strict=True):
            before = f"{instruction.strip()} " if instruction.strip() else ""
            own = list(map(ord, text)) if isinstance(text, str) else list(text)
            if any(not 0 <= token_id < CHARACTERS for token_id in own):
                raise TokenizationError("there is no such token", len(rows))
            head = 1 + len(before)
            rows.append(TokenizedText([1, *map(ord, before), *own], head, head=head))
        return rows

    def encode_nothing(self) -> TokenizedText:
        return TokenizedText([1], 0, head=1)

    def locate(self, text: str, instruction: str) -> tuple[TokenizedText, list[tuple[int, int]]]:
        row = self.encode_batch([text], [instruction])[0]
        return row, [(0, 0)] * row.head + [(place, place + 1) for place in range(len(text))]

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        return ["<bos>" if token_id == 1 else chr(token_id) for token_id in token_ids]

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return ["" if token_id == 1 else chr(token_id) for token_id in token_ids]

    def parts(self, row: TokenizedText, instruction: str) -> list[Part]:
        places = range(len(row))
        return ["special" if not place else "instruction" if place < row.head else "text" for place in places]

    def special_tokens(self) -> frozenset[int]:
        return frozenset({1})

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(token_id) for token_id in token_ids if not (skip_special_tokens and token_id == 1))


def fake_vector(row: EmbedRow) -> Vector:
    """A vector of length 1 that only this row has."""
    if row.text.spans:
        return np.stack([_vector(row, row.text.token_ids[slice(*span)]) for span in row.text.spans])
    return _vector(row, row.text.token_ids)


def rows_of(*texts: str) -> list[EmbedRow]:
    return [EmbedRow(text, WIDTH) for text in FakeTokenizer().encode_batch(texts, [""] * len(texts))]


def expected(text: str, instruction: str = "", dimensions: int = WIDTH, normalize: bool = True) -> Vector:
    """The vector that a text gets from the fakes."""
    return fake_vector(EmbedRow(FakeTokenizer().encode_batch([text], [instruction])[0], dimensions, normalize))


def _vector(row: EmbedRow, token_ids: Sequence[int]) -> Vector:
    seed = sum((place + 1) * token for place, token in enumerate(token_ids))
    vector = np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)[: row.width]
    shortened: Vector = vector / np.linalg.norm(vector) if row.normalize else 3 * vector
    return shortened


class FakeWorker:
    """Answers at once, or when `gate` is set; remembers the batches it was given."""

    device, dtype, kernel = "fake", "float32", "fake"

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.batches: list[list[str]] = []
        self.broken = False
        self.start_error: Exception | None = None

    async def start(self, limits: Limits) -> DevicePlan:
        if self.start_error:
            raise self.start_error
        return DevicePlan(COST, limits.for_batches(COST))

    async def run_batch(self, rows: list[EmbedRow]) -> Sequence[Vector | EncodingError]:
        texts = ["".join(map(chr, row.text.token_ids[row.text.span_start :])) for row in rows]
        self.batches.append(texts)
        await self.gate.wait()
        if HANGS in texts:
            await asyncio.Event().wait()
        if self.broken or BREAKS_THE_BATCH in texts:
            raise RuntimeError("device-side assert triggered")
        if OUT_OF_MEMORY in texts or (OUT_OF_MEMORY_IN_COMPANY in texts and len(texts) > 1):
            raise OutOfMemory("the device has too little memory for this input")
        return [
            NonFiniteEmbedding("no finite vector")
            if text == NOT_FINITE or (text == NOT_FINITE_IN_COMPANY and len(texts) > 1)
            else fake_vector(row)
            for text, row in zip(texts, rows, strict=True)
        ]

    def stop(self) -> None:
        pass


class Server:
    """The application over fakes, in a test client."""

    def __init__(
        self,
        worker: FakeWorker | None = None,
        traces: Traces | None = None,
        described: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        self.worker = worker or FakeWorker()
        self.fatal: list[BaseException] = []
        settings = Settings(**given)
        manifest = fake_manifest().model_copy(update=described)
        limits = Limits(settings, manifest, "cpu")
        self.metrics = Metrics()
        self.app: FastAPI = create_app(
            Served(
                settings,
                manifest,
                FakeTokenizer(),
                limits,
                LocalBackend(self.worker, settings, manifest, limits, self.metrics),
                self.metrics,
            ),
            self.fatal.append,
            traces=traces,
        )
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def embed(self, _headers: dict[str, str] | None = None, **body: Any) -> Any:
        return self.client.post("/v1/embeddings", json=body, headers=_headers)

    def metric(self, line: str) -> float:
        page = self.client.get("/metrics").text
        return float(next(row for row in page.splitlines() if row.startswith(line)).rpartition(" ")[2])

    @asynccontextmanager
    async def running(self) -> AsyncIterator[httpx.AsyncClient]:
        """The application in this event loop, ready, and a client of it."""
        transport = httpx.ASGITransport(self.app)
        async with (
            self.app.router.lifespan_context(self.app),
            httpx.AsyncClient(transport=transport, base_url="http://server") as client,
        ):
            await until(lambda: self.app.state.parts.life.phase == "ready")
            yield client


@asynccontextmanager
async def overloaded(**given: Any) -> AsyncIterator[tuple[FakeWorker, httpx.AsyncClient]]:
    """A server that computes one request while another fills its queue, and a client of it. Both get their answers."""
    server = Server(max_queued_tokens=20, **given)
    worker = server.worker
    worker.gate.clear()
    async with server.running() as client:
        computing = asyncio.create_task(client.post("/v1/embeddings", json={"input": "computing"}))
        await until(lambda: worker.batches)
        waiting = asyncio.create_task(client.post("/v1/embeddings", json={"input": "waiting one"}))
        await until(lambda: server.app.state.parts.backend.batcher.queued_tokens)
        yield worker, client
        worker.gate.set()
        for accepted in (computing, waiting):
            assert (await accepted).status_code == 200


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that takes a few turns of the event loop."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")
