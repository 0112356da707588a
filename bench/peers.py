"""Other embedding servers, started as their users would and asked over HTTP like ours.

Each runs in an environment of its own, made by bench/make_peers.sh. They read the stored encoder's own weights in
bfloat16, attend in both directions as it does and pool the mean, though over BOS too: the same work, and vectors that
are alike.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.server import Server, free_port, running

ENVIRONMENTS = Path(__file__).parents[1] / "build" / "peers"
MODEL = "encoder"
MAX_LENGTH = 2048  # tokens: more than any text in bench/texts.py has

_OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
_CORES = ",".join(map(str, sorted(os.sched_getaffinity(0))))


@dataclass(frozen=True)
class _Peer:
    command: Callable[[Path, int], list[str]]
    environment: dict[str, str]


def _vllm(folder: Path, port: int) -> list[str]:
    return [
        *("vllm", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL),
        *("--runner", "pooling", "--dtype", "bfloat16", "--max-model-len", str(MAX_LENGTH)),
        *("--uvicorn-log-level", "warning"),
    ]


def _infinity(folder: Path, port: int) -> list[str]:
    return [
        *("infinity_emb", "v2", "--host", "127.0.0.1", "--port", str(port), "--url-prefix", "/v1"),
        *("--model-id", str(folder), "--served-model-name", MODEL, "--engine", "torch", "--device", "cpu"),
        *("--dtype", "bfloat16", "--batch-size", "32", "--no-bettertransformer", "--no-compile"),
        *("--no-model-warmup", "--log-level", "warning"),
    ]


_PEERS = {
    "vllm": _Peer(
        _vllm,
        {
            # left to itself it keeps one core free for its scheduler, which is half of a machine with two
            "VLLM_CPU_OMP_THREADS_BIND": _CORES,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        },
    ),
    "infinity": _Peer(_infinity, {"INFINITY_ANONYMOUS_USAGE_STATS": "0"}),
}


def available_peers() -> list[str]:
    """The peers whose environments bench/make_peers.sh has made here."""
    return [name for name in _PEERS if (ENVIRONMENTS / name / ".installed").is_file()]


@contextmanager
def start_peer(name: str, model: Path) -> Iterator[Server]:
    """A peer that serves this stored encoder under the name MODEL and is ready, until the block is left."""
    peer, home = _PEERS[name], ENVIRONMENTS / name
    with tempfile.TemporaryDirectory(prefix=f"{name}-", ignore_cleanup_errors=True) as scratch:
        port = free_port()
        program, *arguments = peer.command(_write_for_peers(model, Path(scratch) / "model"), port)
        environment = {"TMPDIR": scratch, "XDG_CACHE_HOME": scratch, **_OFFLINE, **peer.environment}
        with running([home / "bin" / program, *arguments], port, environment, "/health", Path(scratch)) as server:
            yield server


def _write_for_peers(model: Path, folder: Path) -> Path:
    """The encoder as sentence-transformers' usual modules, which both peers read; weights and tokenizer are links."""
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] == "gemma3_text":
        # How this family's config says "both directions"; the window it names then is as wide as both halves together.
        config |= {"use_bidirectional_attention": True, "sliding_window": 2 * (config["sliding_window"] - 1)}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(
            (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
        )
    ]
    written = {
        "config.json": config,
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": MAX_LENGTH, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": config["hidden_size"], "pooling_mode_mean_tokens": True},
    }
    for path in ("1_Pooling", "2_Normalize"):
        (folder / path).mkdir(parents=True)
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    for pattern in ("*.safetensors", "*.safetensors.index.json", "token*.json", "special_tokens_map.json"):
        for file in model.glob(pattern):
            (folder / file.name).symlink_to(file.resolve())
    return folder
