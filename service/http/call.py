"""One request about texts, as all dialects handle it: read it, translate it, embed, write the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel

from service.embedding.instructions import Chosen
from service.embedding.requests import EmbedInput, EmbedRequest, EmbedResult
from service.embedding.rows import Vector
from service.errors import ClientGone, InvalidRequest
from service.http.answers import json_answer
from service.http.common import split_text
from service.http.headers import MOST_NAMED, answer_headers, header_text, ignored_header
from service.http.parts import outcome_of, parts_of
from service.http.requests import parse, read_document, require_ready

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result", bound=EmbedResult)
T = TypeVar("T")

# Characters of a model's name in a header.
_NAME_CHARACTERS = 200

# Most requests are answered sooner, and need no task that waits for their client to hang up.
_LISTEN_AFTER_SECONDS = 0.05


class Call(Generic[Body]):
    """A request, its body as a dialect's model, and the `headers` that its answer has beside the usual ones."""

    def __init__(self, request: Request, body: Body, began: float) -> None:
        self.request = request
        self.body = body
        self.parts = parts_of(request)
        self.settings = self.parts.settings
        self.embedder = self.parts.embedder
        self.headers: dict[str, str] = {}
        self._began = began

    @classmethod
    async def read(cls, request: Request, model: type[Body]) -> Call[Body]:
        """Read the request, once the server is ready.

        Raises:
            Unavailable: while it loads or drains.
            ServiceError: whatever is wrong with the body.
        """
        began = time.perf_counter()
        require_ready(request)
        return cls(request, parse(model, await read_document(request)), began)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def alias(self, model: str | None) -> str:
        """The role or prompt that the model's name asks for. If that is not the served name, a header repeats it."""
        alias = self.parts.instructions.alias_of(model, self.parts.served_name)
        if model is not None and model != self.parts.served_name:
            self.headers["x-requested-model"] = header_text(model[:_NAME_CHARACTERS])
        return alias

    def ignore(self, names: Iterable[str] | None) -> None:
        """Name the unknown fields in a header, and count them.

        Raises:
            InvalidRequest: instead, where the settings say so.
        """
        ignored = sorted(names or ())
        if not ignored:
            return
        if self.settings.reject_unknown_fields:
            raise InvalidRequest(f"unknown fields: {', '.join(ignored[:MOST_NAMED])}", "unknown_field", ignored[0])
        self.parts.metrics.ignored_fields.inc(len(ignored))
        self.headers["x-ignored-fields"] = ignored_header(ignored)

    def choose(self, instruction: str | None = None, names: Mapping[str, str | None] = {}, alias: str = "") -> Chosen:
        """As `Instructions.choose`, with the request's headers."""
        headers = self.request.headers
        header_instruction = _utf8(headers.get("x-instruction"))
        return self.parts.instructions.choose(
            instruction, names, alias, header_instruction, headers.get("x-input-type")
        )

    def inputs(self, texts: Iterable[str | Sequence[int]], chosen: Chosen) -> list[EmbedInput]:
        """Inputs with one instruction. A text that holds the separator of the settings brings its own."""
        separator = self.settings.instruction_separator
        return [split_text(text, chosen, separator) for text in texts]

    async def embed(self, asked: EmbedRequest) -> EmbedResult:
        """The vectors. Once the client has hung up, nothing more is computed."""
        return await self.measured(self.embedder.embed(asked, self.note_lane))

    async def measured(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, as `embed` gives it."""
        result = await self.while_connected(work)
        outcome_of(self.request.scope).timings = result.timings
        return result

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled if the client hangs up.

        Raises:
            ClientGone: if the client hung up.
        """
        working = asyncio.current_task()
        assert working is not None
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await self.request.receive())["type"] != "http.disconnect":
                pass
            gone = True
            working.cancel()

        watching: list[asyncio.Task[None]] = []
        timer = asyncio.get_running_loop().call_later(
            _LISTEN_AFTER_SECONDS, lambda: watching.append(asyncio.create_task(watch()))
        )
        try:
            return await work
        except asyncio.CancelledError:
            if not gone:
                raise
            working.uncancel()
            raise ClientGone("the client closed the connection") from None
        finally:
            timer.cancel()
            for task in watching:
                task.cancel()

    def answer(
        self,
        slices: Iterator[bytes],
        inputs: Sequence[EmbedInput],
        result: EmbedResult,
        written: Sequence[Vector] | None = None,
    ) -> Response:
        """An answer of JSON slices. `written` lists each vector as often as the answer holds it, by default once."""
        headers = self._headers(inputs, result)
        vectors = result.vectors if written is None else written
        if not vectors:
            return Response(b"".join(slices), 200, headers, "application/json")
        return self.parts.writer.answer(slices, vectors, headers)

    def json(self, content: Any, inputs: Sequence[EmbedInput], result: EmbedResult) -> Response:
        """A small answer that was computed from vectors."""
        return json_answer(content, self._headers(inputs, result))

    def note_lane(self, lane: str) -> None:
        outcome_of(self.request.scope).lane = lane

    def _headers(self, inputs: Sequence[EmbedInput], result: EmbedResult) -> dict[str, str]:
        return {**answer_headers(self.embedder, inputs, result, self.seconds), **self.headers}


def _utf8(header: str | None) -> str | None:
    """A header's text: the framework decodes its bytes as Latin-1, and clients send UTF-8."""
    return None if header is None else header.encode("latin-1").decode(errors="replace")
