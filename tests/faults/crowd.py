"""Many clients at once, whose answers are held to vectors that were computed before, each alone and in float32."""

from __future__ import annotations

import base64
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.text.tokenizer import TextTokenizer
from tests.e2e.process import ServerProcess
from tests.faults.faulty_server import (
    NOT_FINITE,
    NOT_FINITE_IN_COMPANY,
    OUT_OF_MEMORY,
    OUT_OF_MEMORY_IN_COMPANY,
    RAISES,
    RAISES_IN_COMPANY,
    SLOW,
)
from tests.tiny import normalized

Vectors = NDArray[np.float32]

# What is answered to a request with such a text.
ANSWERS = {
    RAISES: (500, "encoding_failed"),
    NOT_FINITE: (500, "non_finite_embedding"),
    OUT_OF_MEMORY: (503, "out_of_memory"),
}

# Texts that fail only beside others, or just take their time: these are answered all the same.
HARMLESS = (RAISES_IN_COMPANY, NOT_FINITE_IN_COMPANY, OUT_OF_MEMORY_IN_COMPANY, SLOW)

# Numbers of one vector may differ by as much, where other texts were in its batch.
TOLERANCE = 1e-5

SIZES = (1, 1, 2, 5, 12)


@dataclass(frozen=True)
class Asked:
    """A request, and what it must come to: vectors, or an error and the index that it names."""

    texts: Sequence[str]
    vectors: Vectors
    bad: int | None = None

    def verdict(self, status: int, content: bytes) -> str:
        """`ok`, `refused` for a clear answer that nothing was computed, or what is wrong with it.

        The answer is of OpenAI's route, in numbers or base64, or of text-embeddings-inference's.
        """
        document = orjson.loads(content)
        code = _code(document)
        if status in (429, 503) and code != "out_of_memory":
            return "refused"
        if self.bad is not None:
            return self._verdict_of_error(status, code, content.decode(), self.bad)
        if status != 200:
            return f"wrong: status {status} {code}"
        items = document if isinstance(document, list) else [item["embedding"] for item in document["data"]]
        given = np.array([_vector(item) for item in items])
        if given.shape != self.vectors.shape:
            return f"wrong: {given.shape}"
        far = float(np.abs(given - self.vectors).max())
        return "ok" if far < TOLERANCE else f"wrong: another's vector, {far}"

    def _verdict_of_error(self, status: int, code: str, content: str, bad: int) -> str:
        mark = next(mark for mark in ANSWERS if self.texts[bad].startswith(mark))
        right = (status, code) == ANSWERS[mark] and f"(input index {bad})" in content
        return "ok" if right else f"wrong: {status} {content[:200]} for {mark}"


def _code(document: Any) -> str:
    error = document.get("error", {}) if isinstance(document, dict) else {}
    return str(error.get("code") if isinstance(error, dict) else document.get("error_type"))


def _vector(item: Any) -> Vectors:
    return np.frombuffer(base64.b64decode(item), "<f4") if isinstance(item, str) else np.array(item, dtype=np.float32)


def reference(folder: Path, texts: Sequence[str]) -> Vectors:
    """Each text's vector, encoded alone."""
    encoder = Encoder.load(folder, device="cpu", dtype="float32")
    rows = TextTokenizer.load(folder, encoder.manifest).encode_batch(texts, [""] * len(texts))
    pooling = encoder.manifest.pooling
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products are small, and threads that wait for their part spin
    try:
        return np.concatenate([normalized(encoder.encode(PackedBatch.pack([row], pooling))).numpy() for row in rows])
    finally:
        torch.set_num_threads(threads)


def make_requests(
    folder: Path, count: int, seed: int = 0, bad_share: float = 0.2, sizes: Sequence[int] = SIZES
) -> list[Asked]:
    """Requests of so many texts, no two texts alike, some with one that fails or is trouble beside others."""
    chance = random.Random(seed)
    drafts: list[tuple[list[str], int | None]] = []
    for number in range(count):
        texts = [
            f"request {seed}.{number} text {place} " + "the river " * chance.randrange(12)
            for place in range(chance.choice(sizes))
        ]
        bad = chance.randrange(len(texts))
        trouble = chance.random()
        if trouble < bad_share:
            texts[bad] = f"{chance.choice(list(ANSWERS))} {texts[bad]}"
        elif trouble < 2 * bad_share:
            texts[bad] = f"{chance.choice(HARMLESS)} {texts[bad]}"
        drafts.append((texts, bad if trouble < bad_share else None))
    vectors = iter(np.split(*_flat(folder, drafts)))
    return [Asked(texts, next(vectors), bad) for texts, bad in drafts]


def _flat(folder: Path, drafts: Sequence[tuple[list[str], int | None]]) -> tuple[Vectors, list[int]]:
    vectors = reference(folder, [text for texts, _ in drafts for text in texts])
    return vectors, [int(end) for end in np.cumsum([len(texts) for texts, _ in drafts])]


def ask_all(
    server: ServerProcess,
    requests: Sequence[Asked],
    clients: int = 24,
    impatient: Callable[[int], bool] = lambda number: False,
) -> Counter[str]:
    """Ask all, so many at a time; how many had which verdict.

    `gone` is a connection that ended without an answer, `never accepted` one that was not made. Requests that are
    `impatient` by their number hang up soon, and their answer is not awaited.
    """
    verdicts: Counter[str] = Counter()
    turn = threading.Lock()

    def ask(number: int, asked: Asked) -> None:
        patience = 0.05 if impatient(number) else 60.0
        try:
            body = {"input": list(asked.texts)}
            answer = httpx.post(f"{server.base_url}/v1/embeddings", json=body, timeout=patience)
            verdict = asked.verdict(answer.status_code, answer.content)
        except httpx.ConnectError:
            verdict = "never accepted"
        except httpx.TimeoutException:
            verdict = "hung up" if impatient(number) else "wrong: no answer"
        except httpx.TransportError:
            verdict = "gone"
        with turn:
            verdicts[verdict] += 1

    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(ask, number, asked) for number, asked in enumerate(requests)]:
            done.result()
    return verdicts
