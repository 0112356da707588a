"""Embedding a stream of texts through a running server, for the tools that measure one."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from itertools import islice

import httpx
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from service.errors import ServiceError

_TEXTS_AT_ONCE = 64


def embed_texts(url: str, texts: Iterable[str], instruction: str = "") -> NDArray[np.float32]:
    """(n, D) vectors of the texts, in order, asked for over `/v1/embeddings`; texts that are too long are cut.

    Raises:
        ServiceError: if the server can't be reached or refuses.
    """
    vectors: list[NDArray[np.float32]] = []
    remaining = iter(tqdm(texts, unit="text", disable=None, leave=False))
    with httpx.Client(base_url=url, timeout=600.0) as client:
        while batch := list(islice(remaining, _TEXTS_AT_ONCE)):
            body = {"input": batch, "encoding_format": "base64", "instruction": instruction or None, "truncate": True}
            try:
                answer = client.post("/v1/embeddings", json=body)
            except httpx.HTTPError as error:
                raise ServiceError(f"{url} can't be reached ({error}): is the server running?") from error
            if answer.status_code != 200:
                raise ServiceError(f"{url} answered {answer.status_code}: {answer.text[:500]}")
            vectors += [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer.json()["data"]]
    return np.stack(vectors)
