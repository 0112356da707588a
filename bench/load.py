"""Clients of an embedding server, light enough to share a small machine with it, and what they saw."""

from __future__ import annotations

import base64
import http.client
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson

_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Answers:
    """Vectors by request, in the order of the requests; seconds of each request, and of all together."""

    vectors: list[np.ndarray[Any, Any]]
    latencies: list[float]
    seconds: float

    def percentiles(self) -> dict[str, float]:
        """p50, p95 and p99 of the requests' latencies in milliseconds."""
        return {f"p{p}_ms": round(float(np.percentile(self.latencies, p)) * 1000, 1) for p in (50, 95, 99)}


class Client:
    """One connection to a server that speaks OpenAI's route; for one thread."""

    def __init__(self, url: str, model: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_SECONDS)
        self._path = f"{parts.path}/embeddings"
        self._model = model

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        """(n, D) vectors."""
        body = orjson.dumps({"model": self._model, "input": list(texts), "encoding_format": "base64"})
        self._connection.request("POST", self._path, body, {"content-type": "application/json"})
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"answered {answer.status}: {content[:300]!r}")
        items = orjson.loads(content)["data"]
        return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in items])


def ask(url: str, model: str, requests: Sequence[Sequence[str]], clients: int) -> Answers:
    """Send the requests in a closed loop of so many clients: each sends its next when it has its last answer."""
    vectors: list[Any] = [None] * len(requests)
    latencies = [0.0] * len(requests)
    places: Iterator[int] = iter(range(len(requests)))
    turn = threading.Lock()

    def work(_: int) -> None:
        client = Client(url, model)
        while True:
            with turn:
                place = next(places, None)
            if place is None:
                return
            began = time.perf_counter()
            vectors[place] = client.embed(requests[place])
            latencies[place] = time.perf_counter() - began

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    return Answers(vectors, latencies, time.perf_counter() - began)
