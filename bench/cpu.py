"""This server beside others on one CPU: the same texts, the same stored weights, in turn, round by round.

    python -m bench.cpu [--model DIR|RECIPE] [--texts 96] [--rounds 3] [--only NAME …] [--save]

A machine whose speed drifts is the same for all in a round; what counts are the ratios. A server that is not being
measured is stopped, as the threads of some go on spinning after their last request. The first case over HTTP and all
that is not over HTTP have so many rounds; the other cases have one. Measured are

    encoder        packed batches one after another, in this process, and its share of the machine's rate at large
                   bfloat16 matrix products (for the linear layers alone, and with attention's products counted)
    lone           short texts one at a time: the bare forward pass, and a request to the server for the same texts
    server         `llm2vec-service serve` asked by 1, 16 and 64 clients, for short, mixed and long texts, and in bulk
    vllm, infinity the same requests to the servers that bench/make_peers.sh has installed, where it has
    openvino       the encoder's rows in OpenVINO in bfloat16, if it is installed there: sorted by length and padded to
                   batches of 512 tokens, its best. Every shape is run once before, as OpenVINO prepares each anew
    padded_sorted  sentence-transformers, batch 32, which sorts by length
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench.client import Answers, ask, percentiles, requests_of
from bench.peers import MODEL, OpenVino, available_peers, start_openvino, start_peer
from bench.report import by_turns, finish, medians, options_of, ratio, seconds_of, tell
from bench.server import Server, serving, stored
from bench.texts import mixed_texts, packed_batches, tokenized
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.encoder.roofline import gemm_flops_per_second
from model_store.pooling_modes import PoolingMode
from model_store.shape import Shape
from model_store.text.tokenizer import TokenizedText

# About what the server's calibration comes to here.
_BATCH_TOKENS = 2048

# (texts, clients, texts a request) of each case over HTTP
_CASES = {
    "mixed, 16 clients": ("mixed", 16, 1),
    "mixed, 1 client": ("mixed", 1, 1),
    "mixed, 64 clients": ("mixed", 64, 1),
    "short, 16 clients": ("short", 16, 1),
    "long, 16 clients": ("long", 16, 1),
    "mixed, 4 clients of 64": ("mixed", 4, 64),
}
_FIRST_CASE = "mixed, 16 clients"

# A client's last request leaves the others alone on the device: several times the texts make that end short.
_REPEATS = 3

Rows = Sequence[TokenizedText]


def main() -> None:
    """Measure and report."""
    peers = available_peers()
    known = [*peers, "padded_sorted"]
    options = options_of(__doc__, model="demo", texts=96, rounds=3, only=known)
    if unknown := set(options.only) - set(known):
        raise SystemExit(f"not installed here: {', '.join(unknown)}. make peers installs what it can be compared with")
    folder, manifest = stored(options.model)
    encoder = load_encoder(folder)
    texts = text_sets(options.texts)
    rows = {kind: tokenized(some, folder) for kind, some in texts.items()}
    with ExitStack() as stack:
        started = [name for name in options.only if name in peers and name != "openvino"]
        servers = {"server": stack.enter_context(serving(folder, {}))}
        servers |= {name: stack.enter_context(start_peer(name, folder)) for name in started}
        over_http = OverHttp(folder, manifest.name, texts, servers)
        openvino = stack.enter_context(start_openvino(folder)) if "openvino" in options.only else None
        ways: dict[str, Callable[[], float]] = {
            "gemm": partial(gemm_flops_per_second, encoder.device, encoder.dtype),
            "encoder": partial(encoder_rate, encoder, rows["mixed"]),
        }
        alike = {}
        if openvino:
            alike = {kind: lowest_cosine(encoder, some, openvino) for kind, some in rows.items()}
            ways["openvino"] = partial(openvino_rate, openvino, rows["mixed"])
        for name in servers:
            over_http.ask(name, texts["mixed"][:16], 4)  # the first batches are not typical
            ways[name] = partial(over_http.rate, name, _FIRST_CASE)
        if "padded_sorted" in options.only:
            ways["padded_sorted"] = padded_rate_of(folder, encoder, texts["mixed"], rows["mixed"])
        encoder_rate(encoder, rows["mixed"][:16])
        rates = by_turns(options.rounds, ways)
        alone = lone(encoder, rows["short"], texts["short"], over_http, openvino)
        over_http.other_cases()
    result = {
        "model": manifest.name,
        "dtype": "bfloat16",
        "texts": options.texts,
        "tokens": {kind: sum(map(len, some)) for kind, some in rows.items()},
        "lone": alone,
        "openvino's lowest cosine to the encoder": alike,
        **comparison(encoder, rows["mixed"], rates),
        "over_http": over_http.cases,
        "lowest cosine to the server": over_http.lowest_cosines(),
    }
    finish("cpu", result, options.save)


class OverHttp:
    """The servers asked over HTTP, one awake at a time, and their figures so far: server → case → figures."""

    def __init__(self, folder: Path, model: str, texts: Mapping[str, list[str]], servers: Mapping[str, Server]) -> None:
        self._folder, self._model, self._texts, self._servers = folder, model, texts, servers
        self.cases: dict[str, dict[str, Any]] = {name: {} for name in servers}
        self._vectors: dict[str, Any] = {}

    def ask(self, name: str, texts: Sequence[str], clients: int, inputs: int = 1) -> Answers:
        """The answers of a server that is awake for as long."""
        requests = requests_of(texts, inputs, self._model if name == "server" else MODEL)
        server = self._servers[name]
        server.send(signal.SIGCONT)
        answers = ask(server.url, requests, clients, keeps=True)
        server.send(signal.SIGSTOP)
        return answers

    def rate(self, name: str, case: str) -> float:
        """Tokens a second of a server in a case."""
        kind, clients, inputs = _CASES[case]
        texts = self._texts[kind] * (_REPEATS if case == _FIRST_CASE else 1)
        # No text twice, or a server that computes equal ones once would be measured by that.
        texts = [f"{number}: {text}" for number, text in enumerate(texts)]
        found = self.ask(name, texts, clients, inputs)
        if case == _FIRST_CASE:
            self._vectors[name] = np.concatenate([one.vectors for one in found.answers[: len(self._texts[kind])]])
        rate = sum(map(len, tokenized(texts, self._folder))) / found.seconds
        self.cases[name][case] = {"tokens_per_second": round(rate), **percentiles(found.latencies, (50, 95, 99))}
        return rate

    def other_cases(self) -> None:
        """All but the first, once each; not for Infinity, which is slow and compared in the first case only."""
        for case in _CASES:
            for name in self._servers:
                if case != _FIRST_CASE and name != "infinity":
                    self.rate(name, case)
                    tell(name, {"case": case, **self.cases[name][case]})

    def lowest_cosines(self) -> dict[str, float]:
        """How near the other servers' vectors are."""
        ours = self._vectors.pop("server")
        return {name: round(float((ours * found).sum(1).min()), 4) for name, found in self._vectors.items()}


def text_sets(count: int) -> dict[str, list[str]]:
    """Sentences, passages, and a day's mix of both."""
    many = mixed_texts(20 * count, seed=1)
    return {
        "mixed": mixed_texts(count),
        "short": [text for text in many if len(text) < 120][:count],
        "long": [text for text in many if len(text) > 1500][: count // 4],
    }


def encoder_rate(encoder: Encoder, rows: Rows) -> float:
    """Tokens a second of the encoder alone."""
    return sum(map(len, rows)) / seconds_of(partial(vectors_of, encoder, rows))


def vectors_of(encoder: Encoder, rows: Rows) -> torch.Tensor:
    """Vectors, not normalised, from batches in the order of the rows."""
    return torch.cat([encoder.encode(batch) for batch in pack(rows, encoder.manifest.pooling)])


def openvino_rate(openvino: OpenVino, rows: Rows) -> float:
    """Tokens a second of OpenVINO alone."""
    return sum(map(len, rows)) / openvino.encode(rows)[0]


def lowest_cosine(encoder: Encoder, rows: Rows, openvino: OpenVino) -> float:
    """Of OpenVINO's vectors to the encoder's. OpenVINO then has run batches of every shape that the rows make."""
    theirs = torch.from_numpy(openvino.encode(rows)[1])
    return round(torch.cosine_similarity(vectors_of(encoder, rows), theirs).min().item(), 4)


def padded_rate_of(folder: Path, encoder: Encoder, texts: Sequence[str], rows: Rows) -> Callable[[], float]:
    """Measures sentence-transformers on the stored weights: padded, transformers' attention, mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(folder), max_seq_length=8192, model_kwargs={"dtype": encoder.dtype})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    peer = SentenceTransformer(modules=[transformer, pooling], device=str(encoder.device))
    peer.encode(mixed_texts(8, seed=2))
    return lambda: sum(map(len, rows)) / seconds_of(partial(peer.encode, list(texts), batch_size=32))


def lone(
    encoder: Encoder, rows: Rows, texts: Sequence[str], over_http: OverHttp, openvino: OpenVino | None
) -> dict[str, float]:
    """Milliseconds (p50) of short texts one at a time: the bare forward pass, the server and OpenVINO, by turns."""
    bare, asked, others = [], [], []
    for row, text in zip(rows, texts, strict=True):
        encode = partial(encoder.encode, PackedBatch.pack([row], encoder.manifest.pooling))
        encode()  # pays for what the other process left in the caches, as the first request does
        bare.append(seconds_of(encode))
        asked += over_http.ask("server", ["again: " + text, text], 1).latencies[1:]
        others += [openvino.encode([row])[0] for _ in range(2)][1:] if openvino else []
    forward, request = (1000 * median(values) for values in (bare, asked))
    found = {"forward_ms": round(forward, 1), "request_ms": round(request, 1), "ratio": round(request / forward, 2)}
    found |= {"openvino_forward_ms": round(1000 * median(others), 1)} if openvino else {}
    tell("lone", found)
    return found


def comparison(encoder: Encoder, rows: Rows, rates: dict[str, list[float]]) -> dict[str, Any]:
    """The rounds' tokens a second beside each other, and the encoder's beside the rate of large matrix products."""
    shape = Shape.read(encoder.model.config.to_dict())
    linear = shape.linear_flops_per_token
    attention = shape.attention_flops(map(len, rows)) / sum(map(len, rows))
    gemm, own = rates.pop("gemm"), rates["encoder"]
    return {
        "tokens_per_second": medians(rates),
        "rounds": {name: [round(value) for value in values] for name, values in rates.items()},
        "gemm_gflops": [round(rate / 1e9) for rate in gemm],
        "encoder's share of the gemm rate": {
            "linear layers": ratio([linear * rate for rate in own], gemm),
            "with attention": ratio([(linear + attention) * rate for rate in own], gemm),
        },
        "ratios": {f"server / {name}": ratio(rates["server"], found) for name, found in rates.items()},
    }


def load_encoder(folder: Path) -> Encoder:
    """As the server has it."""
    encoder = Encoder.load(folder)
    encoder.pack_weights()
    encoder.compile_layers()
    return encoder


def pack(rows: Rows, pooling: PoolingMode) -> list[PackedBatch]:
    """Batches in the order of the rows, as full as the server would make them."""
    return [PackedBatch.pack(batch, pooling) for batch in packed_batches(rows, _BATCH_TOKENS)]


if __name__ == "__main__":
    main()
