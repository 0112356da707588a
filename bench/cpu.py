"""This server beside others on one CPU: the same texts, the same stored weights, in turn, round by round.

    python -m bench.cpu [--model DIR|RECIPE] [--texts 96] [--rounds 3] [--only NAME …] [--save]

A machine whose speed drifts is the same for all in a round; what counts are the ratios. Whoever is not being measured
is stopped, as the threads of some go on spinning after their last request. Measured are

    projections    the encoder with query, key and value as one product against three, by tokens of a batch
    encoder        packed batches one after another, in this process, and its share of the machine's rate at large
                   bfloat16 matrix products (for the linear layers alone, and with attention's products counted)
    lone           short texts one at a time: the bare forward pass, and a request to the server for the same texts
    server         `llm2vec-service serve` asked by 1, 16 and 64 clients, for short, mixed and long texts, and in bulk
    vllm, infinity the same requests to the servers that bench/make_peers.sh has installed, where it has
    padded_sorted  sentence-transformers, batch 32, which sorts by length
    padded         sentence-transformers, batch 32, in the order the texts come
"""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.client import Answers, ask, percentiles, request_bytes
from bench.gpu.clocks import packed_batches
from bench.peers import MODEL, available_peers, start_peer
from bench.report import finish, options_of
from bench.server import serving, stored
from bench.texts import mixed_texts
from model_store.encoder.encoder import Encoder
from model_store.encoder.merged_linear import PartOfProduct
from model_store.encoder.packing import PackedBatch
from model_store.encoder.roofline import gemm_flops_per_second
from model_store.pooling_modes import PoolingMode
from model_store.shape import Shape
from model_store.text.tokenizer import TextTokenizer, TokenizedText

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


def main() -> None:
    """Measure and report."""
    peers = available_peers()
    parser = options_of(__doc__, model=True)
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the first case over HTTP and all that is not; the rest once"
    )
    parser.add_argument(
        "--only", nargs="+", choices=("padded", "padded_sorted", *peers), help="compare with these only"
    )
    options = parser.parse_args()
    others = options.only or [*peers, "padded_sorted", "padded"]

    folder, manifest = stored(options.model)
    encoder = load_encoder(folder)
    texts = text_sets(options.texts)
    tokenizer = TextTokenizer.load(folder, manifest)
    rows = {name: tokenizer.encode_batch(some, [""] * len(some)) for name, some in texts.items()}
    tokens = {name: sum(map(len, some)) for name, some in rows.items()}
    padded = load_peer(folder, encoder) if {"padded", "padded_sorted"} & set(others) else None
    rates: dict[str, list[float]] = {}
    result: dict[str, Any] = {"model": manifest.name, "dtype": "bfloat16", "texts": options.texts, "tokens": tokens}
    result["merged projections"] = against_apart(folder, encoder, rows["mixed"])
    print("merged projections", result["merged projections"], flush=True)
    with ExitStack() as stack:
        servers = {"server": stack.enter_context(serving(folder, {}))}
        for name in others:
            if name in peers:
                servers[name] = stack.enter_context(start_peer(name, folder))
        over_http: dict[str, dict[str, Any]] = {name: {} for name in servers}
        vectors: dict[str, Any] = {}

        def asked(name: str, requests: Sequence[Sequence[str]], clients: int) -> Answers:
            """By a server that is awake for as long."""
            whole = [request_bytes(inputs, manifest.name if name == "server" else MODEL) for inputs in requests]
            servers[name].send(signal.SIGCONT)
            answers = ask(servers[name].url, whole, clients, keeps=True)
            servers[name].send(signal.SIGSTOP)
            return answers

        def run_http(name: str, case: str) -> float:
            kind, clients, at_once = _CASES[case]
            some = texts[kind] * (_REPEATS if case == _FIRST_CASE else 1)
            # No text twice, or a server that computes equal ones once would be measured by that.
            some = [f"{number}: {text}" for number, text in enumerate(some)]
            requests = [some[start : start + at_once] for start in range(0, len(some), at_once)]
            answers = asked(name, requests, clients)
            count = sum(map(len, tokenizer.encode_batch(some, [""] * len(some))))
            if case == _FIRST_CASE:
                vectors[name] = np.concatenate(answers.vectors[: len(texts["mixed"])])
            rate = count / answers.seconds
            over_http[name][case] = {"tokens_per_second": round(rate), **percentiles(answers.latencies, (50, 95, 99))}
            return rate

        parts: dict[str, Callable[[], float]] = {
            "encoder": lambda: timed_encoder(encoder, rows["mixed"], tokens["mixed"]),
            **{name: lambda name=name: run_http(name, _FIRST_CASE) for name in servers},  # type: ignore[misc]
        }
        if padded is not None:
            batches = [texts["mixed"][start : start + 32] for start in range(0, options.texts, 32)]
            parts["padded_sorted"] = lambda: timed(
                tokens["mixed"], lambda: padded.encode(texts["mixed"], batch_size=32)
            )
            parts["padded"] = lambda: timed(tokens["mixed"], lambda: [padded.encode(batch) for batch in batches])
        for name in servers:
            asked(name, [[text] for text in texts["mixed"][:16]], 4)  # the first batches are not typical
        timed_encoder(encoder, rows["mixed"][:16], 1)
        gemm: list[float] = []
        for number in range(options.rounds):
            gemm.append(gemm_flops_per_second(encoder.device, encoder.dtype))
            for name in [part for part in parts if part in ("encoder", "server") or part in others]:
                rates.setdefault(name, []).append(parts[name]())
                print(f"round {number + 1}: {name:14} {rates[name][-1]:8.0f} tokens/s", flush=True)
        result["lone"] = lone(encoder, rows["short"], partial(asked, "server"), texts["short"])
        print("lone", result["lone"], flush=True)
        for case in _CASES:
            for name in [name for name in servers if name != "infinity"]:  # slow, and no other in these cases
                if case not in over_http[name]:
                    run_http(name, case)
                print(f"{case}: {name:10} {over_http[name][case]}", flush=True)
        for kind in ("short", "long"):
            result[f"encoder, {kind}"] = round(timed_encoder(encoder, rows[kind], tokens[kind]))
        result["peak_memory_gb"] = {"server": peak_memory_gb(servers["server"].process.pid)}
    shape = Shape.read(encoder.model.config.to_dict())
    linear = shape.linear_flops_per_token
    attention = shape.attention_flops(map(len, rows["mixed"])) / tokens["mixed"]
    finish(
        "cpu",
        {
            **result,
            "tokens_per_second": {name: round(statistics.median(values)) for name, values in rates.items()},
            "rounds": {name: [round(value) for value in values] for name, values in rates.items()},
            "gemm_gflops": [round(rate / 1e9) for rate in gemm],
            "encoder's share of the gemm rate": {
                "linear layers": ratio([linear * rate for rate in rates["encoder"]], gemm),
                "with attention": ratio([(linear + attention) * rate for rate in rates["encoder"]], gemm),
            },
            "ratios": {
                **{f"server / {name}": ratio(rates["server"], rates[name]) for name in rates if name != "server"},
                **{f"encoder / {name}": ratio(rates["encoder"], rates[name]) for name in rates if name in others},
            },
            "over_http": over_http,
            "lowest cosine to the server": {
                name: round(float((vectors["server"] * found).sum(1).min()), 4)
                for name, found in vectors.items()
                if name != "server"
            },
        },
        options.save,
    )


def text_sets(count: int) -> dict[str, list[str]]:
    """Sentences, passages, and a day's mix of both."""
    mixed = mixed_texts(count)
    many = mixed_texts(20 * count, seed=1)
    return {
        "mixed": mixed,
        "short": [text for text in many if len(text) < 120][:count],
        "long": [text for text in many if len(text) > 1500][: count // 4],
    }


def timed(tokens: int, run: Callable[[], object]) -> float:
    """Tokens a second."""
    began = time.perf_counter()
    run()
    return tokens / (time.perf_counter() - began)


def timed_encoder(encoder: Encoder, rows: Sequence[TokenizedText], tokens: int) -> float:
    """Tokens a second of the encoder alone."""
    return timed(tokens, lambda: [encoder.encode(batch) for batch in pack(rows, encoder.manifest.pooling)])


def against_apart(folder: Path, encoder: Encoder, rows: Sequence[TokenizedText]) -> dict[str, Any]:
    """Time with merged projections as a share of the time with three, and whether the vectors have the same bits."""
    apart = Encoder.load(folder)
    for layer in apart.model.layers:
        parts = [(name, module) for name, module in layer.named_modules() if isinstance(module, PartOfProduct)]
        for name, part in parts:
            layer.set_submodule(name, part.alone())
    apart.pack_weights()
    apart.compile_layers()
    found: dict[str, Any] = {"same_bits": True, "time / time apart": {}}
    long = [token_id for row in rows for token_id in row.token_ids]
    for tokens in (16, 64, 256, 1024, 2048):
        texts = [TokenizedText(long[start : start + 64], 0) for start in range(0, tokens, 64)]
        texts[-1] = TokenizedText(texts[-1].token_ids[: tokens - 64 * (len(texts) - 1)], 0)
        batch = PackedBatch.pack(texts, encoder.manifest.pooling)
        found["same_bits"] &= torch.equal(encoder.encode(batch), apart.encode(batch))
        seconds: dict[int, list[float]] = {0: [], 1: []}
        for _ in range(min(max(4096 // tokens, 7), 40)):
            for which, one in enumerate((encoder, apart)):
                began = time.perf_counter()
                one.encode(batch)
                seconds[which].append(time.perf_counter() - began)
        found["time / time apart"][tokens] = ratio(seconds[0], seconds[1])
    return found


def lone(
    encoder: Encoder, rows: Sequence[TokenizedText], ask: Callable[..., Answers], texts: Sequence[str]
) -> dict[str, float]:
    """Milliseconds (p50) of short texts one at a time: the bare forward pass and the server, by turns."""
    bare, asked = [], []
    for row, text in zip(rows, texts, strict=True):
        batch = PackedBatch.pack([row], encoder.manifest.pooling)
        for _ in range(2):  # the second counts: the first pays for what the other process left in the caches
            began = time.perf_counter()
            encoder.encode(batch)
            seconds = time.perf_counter() - began
        bare.append(seconds)
        asked += ask([["again: " + text], [text]], 1).latencies[1:]
    forward, request = (1000 * statistics.median(values) for values in (bare, asked))
    return {"forward_ms": round(forward, 1), "request_ms": round(request, 1), "ratio": round(request / forward, 2)}


def peak_memory_gb(pid: int) -> float:
    """The most memory that a process had (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6, 2)


def load_peer(folder: Path, encoder: Encoder) -> Any:
    """sentence-transformers on the stored weights: padded batches, transformers' attention, mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(folder), max_seq_length=8192, model_kwargs={"dtype": encoder.dtype})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    peer = SentenceTransformer(modules=[transformer, pooling], device=str(encoder.device))
    peer.encode(mixed_texts(8, seed=2))
    return peer


def load_encoder(folder: Path) -> Encoder:
    """As the server has it."""
    encoder = Encoder.load(folder)
    encoder.pack_weights()
    encoder.compile_layers()
    return encoder


def pack(rows: Sequence[TokenizedText], pooling: PoolingMode) -> list[PackedBatch]:
    """Batches in the order of the rows, as full as the server would make them."""
    return [PackedBatch.pack(batch, pooling) for batch in packed_batches(rows, _BATCH_TOKENS)]


def ratio(left: list[float], right: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return round(statistics.median(a / b for a, b in zip(left, right, strict=True)), 3)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
