"""Other embedding servers, started as their users would and asked over HTTP like ours.

    with start_peer("vllm", model_folder) as peer:
        httpx.post(f"{peer.url}/embeddings", json={"model": peer.model, "input": ["some text"]})

Each runs in an environment of its own, made by bench/make_peers.sh. They read the stored encoder's own weights in
bfloat16, attend in both directions as it does and pool the mean, though over BOS too: the same work, and vectors that
are alike.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

ENVIRONMENTS = Path(__file__).parents[1] / "build" / "peers"
MODEL = "encoder"
MAX_LENGTH = 2048  # tokens: more than any text in bench/texts.py has

_OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
_CORES = ",".join(map(str, sorted(os.sched_getaffinity(0))))


@dataclass(frozen=True)
class RunningPeer:
    """A peer that answers: `url` + "/embeddings" takes what OpenAI's route does, with `model` as the model's name."""

    name: str
    url: str
    process_group: int
    model: str = MODEL


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
def start_peer(name: str, model: Path, seconds: float = 300.0) -> Iterator[RunningPeer]:
    """A peer that serves this stored encoder and is ready, until the block ends; an error shows the end of its log."""
    peer, home = _PEERS[name], ENVIRONMENTS / name
    with tempfile.TemporaryDirectory(prefix=f"{name}-", ignore_cleanup_errors=True) as scratch:
        folder = _write_for_peers(model, Path(scratch) / "model")
        port = _free_port()
        program, *arguments = peer.command(folder, port)
        log = Path(scratch) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [home / "bin" / program, *arguments],
                env={**os.environ, "TMPDIR": scratch, "XDG_CACHE_HOME": scratch, **_OFFLINE, **peer.environment},
                cwd=scratch,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/health", seconds)
            yield RunningPeer(name, f"http://127.0.0.1:{port}/v1", process.pid)
        except Exception as error:
            error.add_note(f"{name}'s log ends:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-60:]))
            raise
        finally:
            _stop(process)


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"it ended with status {process.returncode} before it was ready")
        with suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"it was not ready after {seconds:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it and every process that it started."""
    for stop, seconds in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 20.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, stop)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
