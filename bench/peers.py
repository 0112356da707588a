"""Other embedding servers, started as their users would and asked over HTTP like ours, and OpenVINO without a server.

Each runs in an environment of its own, made by bench/make_peers.sh. They read the stored encoder's own weights in
bfloat16, attend in both directions as it does and pool the mean, though the servers pool BOS too: the same work, and
vectors that are alike.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from bench.server import Server, free_port, running
from model_store.text.tokenizer import TokenizedText

_ROOT = Path(__file__).parents[1]
ENVIRONMENTS = _ROOT / "build" / "peers"
MODEL = "encoder"
MAX_LENGTH = 2048  # tokens: more than any text in bench/texts.py has

_COMMANDS = {
    "vllm": "vllm serve {folder} --host 127.0.0.1 --port {port} --served-model-name {name} --runner pooling "
    "--dtype bfloat16 --max-model-len {length} --uvicorn-log-level warning",
    "infinity": "infinity_emb v2 --model-id {folder} --host 127.0.0.1 --port {port} --served-model-name {name} "
    "--url-prefix /v1 --engine torch --device cpu --dtype bfloat16 --batch-size 32 --no-bettertransformer --no-compile "
    "--no-model-warmup --log-level warning",
}
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "INFINITY_ANONYMOUS_USAGE_STATS": "0",
    # Left to itself vLLM keeps one core free for its scheduler, which is half of a machine with two.
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def available_peers() -> list[str]:
    """The peers whose environments bench/make_peers.sh has made here."""
    return [name for name in (*_COMMANDS, "openvino") if (ENVIRONMENTS / name / ".installed").is_file()]


@contextmanager
def start_peer(name: str, model: Path) -> Iterator[Server]:
    """A peer that serves this stored encoder under the name MODEL and is ready, until the block is left."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-", ignore_cleanup_errors=True) as scratch:
        port, folder = free_port(), shlex.quote(str(_write_for_peers(model, Path(scratch) / "model")))
        command = shlex.split(_COMMANDS[name].format(folder=folder, port=port, name=MODEL, length=MAX_LENGTH))
        command[0] = str(ENVIRONMENTS / name / "bin" / command[0])
        environment = {"TMPDIR": scratch, "XDG_CACHE_HOME": scratch, **_ENVIRONMENT}
        with running(command, port, environment, "/health", Path(scratch)) as server:
            yield server


class OpenVino:
    """The process of bench/openvino_peer.py, by the pipes from and to it."""

    def __init__(self, given: IO[str], answers: IO[str]) -> None:
        self._given, self._answers = given, answers
        self._answer()  # it is ready

    def encode(self, rows: Sequence[TokenizedText]) -> tuple[float, NDArray[np.float32]]:
        """The seconds that it took, without those in the pipes, and the unit vectors."""
        self._given.write(json.dumps([(row.token_ids, row.span_start) for row in rows]) + "\n")
        self._given.flush()
        answer = json.loads(self._answer())
        return answer["seconds"], np.array(answer["vectors"], dtype=np.float32)

    def _answer(self) -> str:
        if not (line := self._answers.readline()):
            raise RuntimeError("bench.openvino_peer has ended; what it wrote last says why")
        return line


@contextmanager
def start_openvino(model: Path) -> Iterator[OpenVino]:
    """OpenVINO with this stored encoder, ready, until the block is left."""
    python = str(ENVIRONMENTS / "openvino" / "bin" / "python")
    command = [python, "-W", "ignore", "-m", "bench.openvino_peer", str(model.resolve())]
    environment = {**os.environ, **_ENVIRONMENT, "TRANSFORMERS_VERBOSITY": "error"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=_ROOT, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield OpenVino(process.stdin, process.stdout)


def _write_for_peers(model: Path, folder: Path) -> Path:
    """The encoder as sentence-transformers' usual modules, which both peers read; weights and tokenizer are links."""
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] == "gemma3_text":
        # How this family's config says "both directions"; the window it names then is as wide as both halves together.
        config |= {"use_bidirectional_attention": True, "sliding_window": 2 * (config["sliding_window"] - 1)}
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
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
