"""This server beside others on one CPU: the same texts, the same stored weights, in turn, round by round.

    python -m bench.cpu [--model DIR|RECIPE] [--texts 96] [--rounds 3] [--only NAME …] [--save]

A machine whose speed drifts is the same for all in a round; what counts are the ratios. The machine's own rates are
measured before and after. A server that is not being measured is stopped, as the threads of some go on spinning after
their last request. Measured are

    projections    the encoder with query, key and value as one product against three, by tokens of a batch
    encoder        packed batches one after another, in this process, and its share of the machine's rate at large
                   bfloat16 matrix products (for the linear layers alone, and with attention's products counted)
    lone           short texts one at a time: the bare forward pass, and a request to the server for the same texts
    server         `llm2vec-service serve` asked by 1, 16 and 64 clients, for short, mixed and long texts, and in bulk
    vllm, infinity the same requests to the servers that bench/make_peers.sh has installed, where it has
    openvino       the encoder's rows in OpenVINO in bfloat16, if it is installed there: sorted by length and padded to
                   batches of 512 tokens, its best. Every shape is run once before, as OpenVINO prepares each anew
    padded_sorted  sentence-transformers, batch 32, which sorts by length
    padded         sentence-transformers, batch 32, in the order the texts come
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
from bench.report import finish, options_of, ratio, seconds_of, tell
from bench.server import Server, serving, stored
from bench.texts import mixed_texts, packed_batches, tokenized
from model_store.encoder.encoder import Encoder
from model_store.encoder.merged_linear import PartOfProduct
from model_store.encoder.packing import PackedBatch
from model_store.encoder.roofline import gemm_flops_per_second
from model_store.manifest import Manifest
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

# Sets of texts of one kind, which the encoder and OpenVINO run once.
_ONE_KIND = ("short", "long")

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
    machine_rates = {"before": current_rates(encoder)}
    texts = text_sets(options.texts)
    rows = {name: tokenized(some, folder) for name, some in texts.items()}
    tokens = {name: sum(map(len, some)) for name, some in rows.items()}
    merged = against_apart(folder, encoder, rows["mixed"])
    tell("merged projections", merged)
    with ExitStack() as stack:
        servers = {"server": stack.enter_context(serving(folder, {}))}
        started = [name for name in others if name in peers and name != "openvino"]
        servers |= {name: stack.enter_context(start_peer(name, folder)) for name in started}
        over_http = OverHttp(folder, manifest, texts, servers)
        openvino = stack.enter_context(start_openvino(folder)) if "openvino" in others else None
        alike = lowest_cosines(encoder, rows, openvino) if openvino else {}
        in_process = {"encoder": partial(encoder_rate, encoder)}
        in_process |= {"openvino": partial(openvino_rate, openvino)} if openvino else {}
        runs: dict[str, Callable[[], float]] = {name: partial(run, rows["mixed"]) for name, run in in_process.items()}
        runs |= {name: partial(over_http.rate, name, _FIRST_CASE) for name in servers}
        runs |= padded_runs(folder, encoder, texts["mixed"], tokens["mixed"], others)
        for name in servers:
            over_http.ask(name, texts["mixed"][:16], 4)  # the first batches are not typical
        encoder_rate(encoder, rows["mixed"][:16])
        rates, gemm = in_rounds(options.rounds, runs, encoder)
        alone = lone(encoder, rows["short"], texts["short"], over_http, openvino)
        tell("lone", alone)
        over_http.other_cases()
        result = {
            "model": manifest.name,
            "dtype": "bfloat16",
            "texts": options.texts,
            "tokens": tokens,
            "merged projections": merged,
            "lone": alone,
            **{f"{name}, {kind}": round(run(rows[kind])) for name, run in in_process.items() for kind in _ONE_KIND},
            "openvino's lowest cosine to the encoder": alike,
            "peak_memory_gb": {"server": peak_memory_gb(servers["server"].process.pid)},
        }
    machine_rates["after"] = current_rates(encoder)
    compared = comparison(encoder, rows["mixed"], rates, gemm)
    finish("cpu", {"machine_rates": machine_rates, **result, **compared, **over_http.figures()}, options.save)


def current_rates(encoder: Encoder) -> dict[str, float]:
    """What the machine does at this moment at most: a large product in the encoder's dtype, and memory that is read."""
    memory = torch.ones(1 << 27)  # 0.5 GB, of which caches hold little
    seconds = min(seconds_of(memory.sum) for _ in range(5))
    rates = {
        "gemm_gflops": round(gemm_flops_per_second(encoder.device, encoder.dtype) / 1e9),
        "memory_read_gb_per_second": round(memory.nbytes / seconds / 1e9, 1),
    }
    tell("machine", rates)
    return rates


def in_rounds(
    rounds: int, runs: Mapping[str, Callable[[], float]], encoder: Encoder
) -> tuple[dict[str, list[float]], list[float]]:
    """Tokens a second of each in each round, and the rate at large matrix products at each round's beginning."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    gemm: list[float] = []
    for number in range(rounds):
        gemm.append(gemm_flops_per_second(encoder.device, encoder.dtype))
        for name, run in runs.items():
            rates[name].append(run())
            tell(name, {"round": number + 1, "tokens_per_second": round(rates[name][-1])})
    return rates, gemm


class OverHttp:
    """The servers asked over HTTP, one awake at a time, and their figures so far."""

    def __init__(
        self, folder: Path, manifest: Manifest, texts: Mapping[str, list[str]], servers: Mapping[str, Server]
    ) -> None:
        self._folder, self._manifest, self._texts, self._servers = folder, manifest, texts, servers
        self._cases: dict[str, dict[str, Any]] = {name: {} for name in servers}
        self._vectors: dict[str, Any] = {}

    def ask(self, name: str, texts: Sequence[str], clients: int, inputs: int = 1) -> Answers:
        """The answers of a server that is awake for as long."""
        requests = requests_of(texts, inputs, self._manifest.name if name == "server" else MODEL)
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
        answers = self.ask(name, texts, clients, inputs)
        if case == _FIRST_CASE:
            self._vectors[name] = np.concatenate(answers.vectors[: len(self._texts[kind])])
        rate = sum(map(len, tokenized(texts, self._folder))) / answers.seconds
        waits = percentiles(answers.latencies, (50, 95, 99))
        self._cases[name][case] = {"tokens_per_second": round(rate), **waits}
        return rate

    def other_cases(self) -> None:
        """All but the first, once each; not for Infinity, which is slow and compared in the first case only."""
        for case in _CASES:
            for name in self._servers:
                if case != _FIRST_CASE and name != "infinity":
                    self.rate(name, case)
                    tell(name, {"case": case, **self._cases[name][case]})

    def figures(self) -> dict[str, Any]:
        """Every case's, and how near the other servers' vectors are."""
        ours = self._vectors.pop("server")
        near = {name: round(float((ours * found).sum(1).min()), 4) for name, found in self._vectors.items()}
        return {"over_http": self._cases, "lowest cosine to the server": near}


def text_sets(count: int) -> dict[str, list[str]]:
    """Sentences, passages, and a day's mix of both."""
    mixed = mixed_texts(count)
    many = mixed_texts(20 * count, seed=1)
    return {
        "mixed": mixed,
        "short": [text for text in many if len(text) < 120][:count],
        "long": [text for text in many if len(text) > 1500][: count // 4],
    }


def encoder_rate(encoder: Encoder, rows: Sequence[TokenizedText]) -> float:
    """Tokens a second of the encoder alone."""
    seconds = seconds_of(lambda: [encoder.encode(batch) for batch in pack(rows, encoder.manifest.pooling)])
    return sum(map(len, rows)) / seconds


def openvino_rate(openvino: OpenVino, rows: Sequence[TokenizedText]) -> float:
    """Tokens a second of OpenVINO alone."""
    seconds, _ = openvino.encode(rows)
    return sum(map(len, rows)) / seconds


def lowest_cosines(
    encoder: Encoder, rows: Mapping[str, Sequence[TokenizedText]], openvino: OpenVino
) -> dict[str, float]:
    """Of OpenVINO's vectors to the encoder's, by set of texts. OpenVINO then has run batches of every shape."""
    found = {}
    for kind, some in rows.items():
        vectors = torch.cat([encoder.encode(batch) for batch in pack(some, encoder.manifest.pooling)])
        cosines = torch.cosine_similarity(vectors, torch.from_numpy(openvino.encode(some)[1]))
        found[kind] = round(cosines.min().item(), 4)
    tell("openvino", {"lowest cosine to the encoder": found})
    return found


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
        texts = [TokenizedText(long[start : min(start + 64, tokens)], 0) for start in range(0, tokens, 64)]
        batch = PackedBatch.pack(texts, encoder.manifest.pooling)
        found["same_bits"] &= torch.equal(encoder.encode(batch), apart.encode(batch))
        rounds = min(max(4096 // tokens, 7), 40)
        times = [[seconds_of(partial(one.encode, batch)) for one in (encoder, apart)] for _ in range(rounds)]
        found["time / time apart"][tokens] = ratio(*zip(*times, strict=True))
    return found


def lone(
    encoder: Encoder,
    rows: Sequence[TokenizedText],
    texts: Sequence[str],
    over_http: OverHttp,
    openvino: OpenVino | None,
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
    return found | ({"openvino_forward_ms": round(1000 * median(others), 1)} if openvino else {})


def comparison(
    encoder: Encoder, rows: Sequence[TokenizedText], rates: Mapping[str, list[float]], gemm: Sequence[float]
) -> dict[str, Any]:
    """The rounds' tokens a second beside each other, and the encoder's beside the rate of large matrix products."""
    shape = Shape.read(encoder.model.config.to_dict())
    linear = shape.linear_flops_per_token
    attention = shape.attention_flops(map(len, rows)) / sum(map(len, rows))
    own = rates["encoder"]
    others = [name for name in rates if name not in ("encoder", "server")]
    return {
        "tokens_per_second": {name: round(median(values)) for name, values in rates.items()},
        "rounds": {name: [round(value) for value in values] for name, values in rates.items()},
        "gemm_gflops": [round(rate / 1e9) for rate in gemm],
        "encoder's share of the gemm rate": {
            "linear layers": ratio([linear * rate for rate in own], gemm),
            "with attention": ratio([(linear + attention) * rate for rate in own], gemm),
        },
        "ratios": {
            **{f"server / {name}": ratio(rates["server"], rates[name]) for name in ("encoder", *others)},
            **{f"encoder / {name}": ratio(own, rates[name]) for name in others},
        },
    }


def peak_memory_gb(pid: int) -> float:
    """The most memory that a process had (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6, 2)


def padded_runs(
    folder: Path, encoder: Encoder, texts: Sequence[str], tokens: int, names: Sequence[str]
) -> dict[str, Callable[[], float]]:
    """Tokens a second of sentence-transformers on the stored weights: padded, transformers' attention, mean pooling."""
    if not {"padded", "padded_sorted"} & set(names):
        return {}
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(folder), max_seq_length=8192, model_kwargs={"dtype": encoder.dtype})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    peer = SentenceTransformer(modules=[transformer, pooling], device=str(encoder.device))
    peer.encode(mixed_texts(8, seed=2))
    batches = {
        "padded_sorted": [texts],  # which it sorts, and cuts into batches of 32
        "padded": [texts[start : start + 32] for start in range(0, len(texts), 32)],
    }

    def rate(name: str) -> float:
        return tokens / seconds_of(lambda: [peer.encode(batch, batch_size=32) for batch in batches[name]])

    return {name: partial(rate, name) for name in batches if name in names}


def load_encoder(folder: Path) -> Encoder:
    """As the server has it."""
    encoder = Encoder.load(folder)
    encoder.pack_weights()
    encoder.compile_layers()
    return encoder


def pack(rows: Sequence[TokenizedText], pooling: PoolingMode) -> list[PackedBatch]:
    """Batches in the order of the rows, as full as the server would make them."""
    return [PackedBatch.pack(batch, pooling) for batch in packed_batches(rows, _BATCH_TOKENS)]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
