"""A client of a running server, for whole files of texts: patient, and exact about which texts got which vectors.

It waits when the server says that it has no room (Retry-After). It tries again when a connection breaks or a proxy
answers in the server's place. It gives up when nothing has gone well for a while, and at once if the server was never
reached or says that the request itself is wrong.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import orjson
from numpy.typing import NDArray
from tqdm import tqdm

from model_store.manifest import Role
from model_store.text.prompts import EncoderPrompts, Prompt
from service.bulk.job import VectorSource
from service.bulk.pipeline import Embedded, gather_all
from service.errors import EncodingError, InvalidRequest, ServiceError
from service.logs import log
from service.settings import KEY_VARIABLE

# Answers after which the same request may well succeed. 500 is also what proxies answer for a server that died.
_COME_AGAIN = frozenset({408, 429, 500, 502, 503, 504})

# The error codes of a text that the device fails on, also when it is sent alone.
_OF_A_TEXT = frozenset({"non_finite_embedding", "encoding_failed", "out_of_memory"})

_MOST_RETRY_AFTER_SECONDS = 300.0
_ANSWER_SECONDS = 600.0
_SAY_AGAIN_SECONDS = 10.0

_TEXTS_AT_ONCE = 64
_REQUESTS_AT_ONCE = 4


@dataclass(frozen=True)
class Answer(Embedded):
    embedding_space: str


@dataclass(frozen=True)
class Patience:
    """When to try again, unless the server says when, and when to give up: `seconds` after the last success.

    Waits double, up to the longest. A request that got status 500 more than `most_failures` times is given up.
    """

    seconds: float = 600.0
    first_wait_seconds: float = 0.2
    longest_wait_seconds: float = 30.0
    most_failures: int = 8


PATIENCE = Patience()


class ServerClient:
    """Asks one server, within an `async with` block. Several requests may be on their way at once.

    Every method raises a ServiceError if the server can't be reached, or is no server of this kind.

    `reached` says that another client has had an answer from this server. Then even the first request is tried again
    after a failure.
    """

    def __init__(self, url: str, patience: Patience = PATIENCE, *, reached: bool = False) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._patience = patience
        key = os.environ.get(KEY_VARIABLE, "")
        try:
            self._http = httpx.AsyncClient(
                base_url=self.url,
                timeout=httpx.Timeout(_ANSWER_SECONDS, connect=10.0),
                limits=httpx.Limits(max_connections=None),
                headers={"authorization": f"Bearer {key}"} if key else {},
            )
        except UnicodeEncodeError:
            raise ServiceError(f"{KEY_VARIABLE} is no key of a server: it holds more than ASCII characters") from None
        except httpx.InvalidURL as error:
            raise ServiceError(f"{url} is not an address of a server: {error}") from error
        self._went_well = time.monotonic() if reached else 0.0  # time of the last success; 0 if there was none
        self._said = 0.0

    async def __aenter__(self) -> ServerClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def served_model(self) -> VectorSource:
        _, found = await self._ask("GET", "/v1/models")
        try:
            model = found["data"][0]
            return VectorSource(
                model=model["id"],
                embedding_space=model["embedding_space"],
                width=model["dimensions"],
                max_input_tokens=model["max_input_tokens"],
                widths=model.get("widths", ()),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServiceError(f"{self.url} is not this service: its /v1/models does not name {error}") from error

    async def prompts(self) -> EncoderPrompts:
        _, found = await self._ask("GET", "/v1/prompts")
        try:
            return EncoderPrompts({name: Prompt(**sides) for name, sides in found["prompts"].items()}, found["lead"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ServiceError(f"{self.url} is not this service: its /v1/prompts has no prompts ({error})") from error

    async def instruction(self, given: str | None, input_type: str | None) -> str:
        """The instruction that the server puts before a text whose request says this, and no more if it is None."""
        if given is not None:
            return given
        body = orjson.dumps({"input": "a", **({"input_type": input_type} if input_type else {})})
        _, found = await self._ask("POST", "/v1/prompts/preview", body)
        try:
            return str(found["data"][0]["instruction"])
        except (KeyError, IndexError, TypeError) as error:
            raise ServiceError(f"{self.url} is not this service: its preview has no instruction ({error})") from error

    async def embed(self, texts: Sequence[str], **fields: Any) -> Answer:
        """Vectors for texts; `fields` are further fields of the body of `POST /v1/embeddings`.

        Raises:
            InvalidRequest, EncodingError: if the server says that one of the texts, or a field, is to blame.
            ServiceError: if the server can't be reached any more, or refuses.
        """
        body = orjson.dumps({"input": texts, "encoding_format": "base64", **fields})
        headers, found = await self._ask("POST", "/v1/embeddings", body)
        try:
            vectors = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in found["data"]]
            tokens, together = int(found["usage"]["prompt_tokens"]), np.stack(vectors)
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceError(f"{self.url} is not this service: what it answers has no vectors ({error})") from error
        if len(vectors) != len(texts):
            raise ServiceError(f"{self.url} answered {len(vectors)} vectors for {len(texts)} texts")
        return Answer(together, tokens, headers.get("x-embedding-space", ""))

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> tuple[httpx.Headers, Any]:
        """Ask until an answer is good. Returns its headers and its JSON."""
        patience = self._patience
        began, waits, failures = time.monotonic(), 0, 0
        while True:
            asked_to_wait = None
            try:
                answer = await self._http.request(
                    method, path, content=body, headers={"content-type": "application/json"}
                )
            except httpx.RequestError as error:
                problem = f"{self.url} can't be reached ({error or type(error).__name__})"
                if not self._went_well:
                    raise ServiceError(f"{problem}: is the server running?") from error
            else:
                problem = f"{self.url} answered {answer.status_code}"
                if answer.status_code == 200:
                    try:
                        found = orjson.loads(answer.content)
                    except orjson.JSONDecodeError as error:
                        problem += f" with {answer.headers.get('content-type') or 'something'}, not with JSON"
                        if not self._went_well:
                            raise ServiceError(f"{problem}: is it the address of this service?") from error
                    else:
                        self._went_well = time.monotonic()
                        return answer.headers, found
                elif (refusal := self._refusal(answer)) is not None:
                    raise refusal
                asked_to_wait = _retry_after(answer)
                failures += answer.status_code == 500
            now = time.monotonic()
            if now - max(began, self._went_well) > patience.seconds or failures > patience.most_failures:
                raise ServiceError(f"{problem}, and again and again for {now - began:.0f} s: given up")
            if now - self._said > _SAY_AGAIN_SECONDS:
                self._said = now
                log.warning("%s: trying again", problem)
            own_wait = min(patience.first_wait_seconds * 2**waits, patience.longest_wait_seconds)
            waits += asked_to_wait is None
            await asyncio.sleep((own_wait if asked_to_wait is None else asked_to_wait) * random.uniform(1.0, 1.25))

    def _refusal(self, answer: httpx.Response) -> ServiceError | None:
        """The error that the answer reports; None if the same request may be sent again."""
        page = "html" in answer.headers.get("content-type", "")
        code, message = "", answer.reason_phrase if page else answer.text[:500]
        try:
            error = orjson.loads(answer.content)["error"]
            code, message = str(error["code"]), str(error["message"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            pass  # the answer is a proxy's, not this service's
        if code in _OF_A_TEXT:
            return EncodingError(message)
        if answer.status_code in _COME_AGAIN:
            return None
        if answer.status_code in (400, 413, 422):
            return InvalidRequest(message, code or "invalid_request")
        hint = f": set {KEY_VARIABLE} to a key of this server" if answer.status_code == 401 else ""
        return ServiceError(f"{self.url} answered {answer.status_code} ({message}){hint}")


def _retry_after(answer: httpx.Response) -> float | None:
    """The seconds that an answer asks to wait, or None. A date in Retry-After is not read."""
    for header, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return min(max(float(answer.headers[header]) * unit, 0.0), _MOST_RETRY_AFTER_SECONDS)
        except (KeyError, ValueError):
            continue
    return None


def served_prompts(url: str) -> EncoderPrompts:
    async def ask() -> EncoderPrompts:
        async with ServerClient(url) as client:
            return await client.prompts()

    return asyncio.run(ask())


def embed_texts(
    url: str, texts: Iterable[str], instruction: str | None = None, role: Role | None = None
) -> NDArray[np.float32]:
    """(n, D) vectors of the texts, in order, from a server's `/v1/embeddings`. Texts that are too long are cut.

    Without an `instruction` the server chooses that of the `role`, or its default.
    """
    given = list(texts)
    asked = {"input_type": role} if instruction is None else {"instruction": instruction}
    batches = [given[start : start + _TEXTS_AT_ONCE] for start in range(0, len(given), _TEXTS_AT_ONCE)]

    async def embed_all() -> NDArray[np.float32]:
        at_once = asyncio.Semaphore(_REQUESTS_AT_ONCE)
        with tqdm(total=len(given), unit="text", disable=None, leave=False) as bar:
            async with ServerClient(url) as client:

                async def embed(batch: Sequence[str]) -> NDArray[np.float32]:
                    async with at_once:
                        answer = await client.embed(batch, **asked, overflow="truncate")
                    bar.update(len(batch))
                    return answer.vectors

                return np.concatenate(await gather_all([embed(batch) for batch in batches]))

    return asyncio.run(embed_all())
