"""Tokens a second on one device: the encoder alone, the server over HTTP, and sentence-transformers.

    python -m bench.throughput [--model DIR|RECIPE] [--texts N] [--rounds N] [--clients N] [--parts …] [--save]

Everybody embeds the same texts with the same stored weights, in turn, round by round, so that a machine whose speed
drifts is the same for all; what counts are the ratios. Parts:

    encoder       packed batches, one after another, in this process
    server        `llm2vec-service serve` as a process of its own, asked by so many clients, one text a request
    padded_sorted sentence-transformers, batch 32, which sorts by length
    padded        sentence-transformers, batch 32, in the order the texts come
"""

from __future__ import annotations

import argparse
import base64
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from bench.report import finish
from bench.texts import mixed_texts
from model_store.encoder import Encoder
from model_store.packing import PackedBatch
from model_store.tokenizer import TextTokenizer, TokenizedText
from service.server import prepare_store
from service.settings import Settings
from tests.e2e.process import ServerProcess

# What calibration comes to on a CPU, and more than enough on a GPU.
_BATCH_TOKENS = 2048

PARTS = ("encoder", "server", "padded_sorted", "padded")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="measure these only")
    parser.add_argument("--save", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()

    settings = Settings(model=options.model)
    folder, manifest = prepare_store(settings, lambda done, total: None)
    encoder = Encoder.load(folder)
    texts = mixed_texts(options.texts)
    rows = TextTokenizer.load(folder, manifest).encode_batch(texts, [""] * len(texts))
    tokens = sum(map(len, rows))
    peer = load_peer(folder, encoder.device, encoder.dtype)
    rates: dict[str, list[float]] = {}

    with ServerProcess(folder, {"LLM2VEC_COMPILE": "auto"}) as server:
        server_vectors: list[np.ndarray[Any, Any]] = []
        # A client's last request leaves the others alone on the device: several times the texts make that end short.
        asked = texts * 3
        parts: dict[str, tuple[int, Callable[[], object]]] = {
            "encoder": (tokens, lambda: [encoder.encode(batch) for batch in pack(rows, _BATCH_TOKENS, manifest)]),
            "server": (
                3 * tokens,
                lambda: server_vectors.__setitem__(slice(None), ask(server, asked, options.clients)),
            ),
            "padded_sorted": (tokens, lambda: peer.encode(texts, batch_size=32)),
            "padded": (tokens, lambda: [peer.encode(texts[i : i + 32]) for i in range(0, len(texts), 32)]),
        }
        encoder.encode(PackedBatch.pack(rows[:8], manifest.pooling))
        peer.encode(texts[:8])
        for number in range(options.rounds):
            for name in options.parts:
                count, run = parts[name]
                began = time.perf_counter()
                run()
                rate = count / (time.perf_counter() - began)
                rates.setdefault(name, []).append(rate)
                print(f"round {number + 1}: {name:14} {rate:8.0f} tokens/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    finish(
        "throughput",
        {
            "model": manifest.name,
            "device": str(encoder.device),
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "texts": len(texts),
            "tokens": tokens,
            "clients": options.clients,
            "tokens_per_second": {name: round(value) for name, value in medians.items()},
            "rounds": {name: [round(value) for value in values] for name, values in rates.items()},
            "ratios": {
                f"{left} / {right}": ratio(rates[left], rates[right])
                for left, right in (("server", "encoder"), ("encoder", "padded_sorted"), ("encoder", "padded"))
                if left in rates and right in rates
            },
            **agreement(server_vectors, texts, peer),
        },
        options.save,
    )


def agreement(server_vectors: list[np.ndarray[Any, Any]], texts: list[str], peer: Any) -> dict[str, float]:
    """How alike the server's vectors and the peer's are; the peer pools BOS too."""
    if not server_vectors:
        return {}
    lowest = (np.stack(server_vectors[: len(texts)]) * normalized(peer.encode(texts))).sum(1).min()
    return {"lowest cosine, server to sentence-transformers": round(float(lowest), 5)}


def load_peer(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """sentence-transformers on the stored weights: padded batches, transformers' attention, mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(folder), max_seq_length=8192, model_kwargs={"dtype": dtype})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling], device=str(device))


def pack(rows: Sequence[TokenizedText], batch_tokens: int, manifest: Any) -> Iterator[PackedBatch]:
    """Batches in the order of the rows, as full as the server would make them."""
    batch: list[TokenizedText] = []
    for row in rows:
        if batch and sum(map(len, batch)) + len(row) > batch_tokens:
            yield PackedBatch.pack(batch, manifest.pooling)
            batch = []
        batch.append(row)
    yield PackedBatch.pack(batch, manifest.pooling)


def ask(server: ServerProcess, texts: list[str], clients: int) -> list[np.ndarray[Any, Any]]:
    """One request a text, so many at a time; the vectors in the order of the texts."""

    def embed(text: str) -> np.ndarray[Any, Any]:
        answer = server.embed(text, client, encoding_format="base64")
        assert answer.status_code == 200, answer.text
        return np.frombuffer(base64.b64decode(answer.json()["data"][0]["embedding"]), "<f4")

    limits = httpx.Limits(max_connections=clients)
    with httpx.Client(limits=limits) as client, ThreadPoolExecutor(clients) as pool:
        return list(pool.map(embed, texts))


def normalized(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows of length 1."""
    floats = np.asarray(vectors, dtype=np.float32)
    result: np.ndarray[Any, Any] = floats / np.linalg.norm(floats, axis=1, keepdims=True)
    return result


def ratio(left: list[float], right: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return round(statistics.median(a / b for a, b in zip(left, right, strict=True)), 3)


if __name__ == "__main__":
    main()
