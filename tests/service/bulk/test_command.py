"""The command with a real encoder, tiny but whole: in this process, behind a server, and killed in the midst of it."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.text.prompts import load_prompts
from model_store.text.tokenizer import TextTokenizer
from service.bulk.sources import LocalVectors, Wanted
from service.cli import main
from service.embedding.vector_dtypes import quantize_vectors
from service.settings import KEY_VARIABLE, Settings
from tests.e2e.process import ServerProcess
from tests.service.bulk.output import read_output
from tests.tiny import build_tiny

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query:"
TEXTS = ["A plane is taking off.", "a", "The river ran past the mill. " * 9, "Größe 🙂", " white space \t"]

# float32 sums in another order, as batches differ.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "tiny"
    build_tiny(folder, "gemma3_text", query_instruction="Find:", widths=[16, 32])
    return folder


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the command sets for a process of its own."""
    root, thresholds, interval = logging.getLogger(), gc.get_threshold(), sys.getswitchinterval()
    handlers, level, caller = list(root.handlers), root.level, logging._srcfile
    monkeypatch.setenv("LLM2VEC_COMPILE", "off")
    monkeypatch.delenv("LLM2VEC_LOG_LEVEL", raising=False)
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    sys.setswitchinterval(interval)
    root.handlers, logging._srcfile = handlers, caller
    root.setLevel(level)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = True


@pytest.mark.parametrize(("given", "full"), [({}, 4096), ({"batch_tokens": 99}, 99)])
async def test_a_batch_has_all_that_fits_unless_told(encoder: Path, given: dict[str, int], full: int) -> None:
    settings = Settings(model=str(encoder), device="cpu", dtype="float32", token_budget=4096, **given)  # type: ignore[arg-type]
    vectors = LocalVectors.prepare(settings, Wanted(), lambda done, total: None)
    async with vectors.running():
        assert vectors.prepared.backend.batcher.batch_tokens == full


def reference(
    folder: Path, texts: list[str], instruction: str = "", dimensions: int | None = None
) -> NDArray[np.float32]:
    """The slow twin: the encoder alone, one text at a time."""
    encoder = Encoder.load(folder, "cpu", "float32")
    tokenizer = TextTokenizer.load(folder, encoder.manifest)
    rows = tokenizer.encode_batch(texts, [instruction] * len(texts))
    vectors = np.concatenate(
        [encoder.encode(PackedBatch.pack([row], encoder.manifest.pooling)).numpy() for row in rows]
    )
    cut: NDArray[np.float32] = vectors[:, :dimensions]
    shortened: NDArray[np.float32] = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    return shortened


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"key": f"k{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


def embed(*arguments: object) -> int:
    return main(["embed", *map(str, arguments)])


@pytest.mark.parametrize(
    ("options", "instruction", "dimensions", "embed_dtype"),
    [
        ([], "", None, "float32"),
        (["--instruction", INSTRUCTION, "--dimensions", "16", "--format", "safetensors"], INSTRUCTION, 16, "float32"),
        (["--input-type", "query"], "Find:", None, "float32"),
        (["--embed-dtype", "float16"], "", None, "float16"),
        (["--embed-dtype", "ubinary", "--dimensions", "16"], "", 16, "ubinary"),
        (["--embed-dtype", "int8", "--format", "safetensors"], "", None, "int8"),
    ],
)
def test_vectors_are_the_encoders_own(
    tmp_path: Path,
    encoder: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    instruction: str,
    dimensions: int | None,
    embed_dtype: Any,
) -> None:
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    arguments = [path, "--model", encoder, "--dtype", "float32", "--out", out, "--id-column", "key", *options]
    assert embed(*arguments) == 0
    assert f"{out}: 5 rows in 1 files" in capsys.readouterr().out
    found = read_output(out)
    assert found.columns["id"] == ["k0", "k1", "k2", "k3", "k4"]
    plain = reference(encoder, TEXTS, instruction, dimensions)
    expected = quantize_vectors(plain, embed_dtype)
    assert found.vectors.dtype == expected.dtype
    if embed_dtype == "ubinary":
        other = np.unpackbits(found.vectors ^ expected, axis=1).astype(bool)
        assert (np.abs(plain[other]) < TOLERANCE).all()  # only a number next to 0 may change its sign
    else:
        tolerance = {"float32": TOLERANCE, "float16": 1e-3, "int8": 1}[embed_dtype]
        np.testing.assert_allclose(found.vectors.astype(float), expected.astype(float), atol=tolerance)
    assert embed(*arguments) == 0
    assert "has it already, whole: 5 rows" in capsys.readouterr().out


def test_a_server_gives_the_same_and_is_asked_with_its_key(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [*TEXTS, "too long " * 600, *TEXTS[:2], ""]
    path = write_texts(tmp_path / "a.jsonl", texts)
    here, there, cut = tmp_path / "here", tmp_path / "there", tmp_path / "cut"
    options = ["--instruction", INSTRUCTION, "--dimensions", "32", "--on-error", "skip"]
    variables = {"LLM2VEC_API_KEYS": "secret", "LLM2VEC_DTYPE": "float32", "LLM2VEC_DEFAULT_INPUT_TYPE": "query"}
    with ServerProcess(encoder, variables) as server:
        assert embed(path, "--url", server.base_url, "--out", there) == 1
        assert "answered 401 (" in (message := capsys.readouterr().err)
        assert f"set {KEY_VARIABLE} to a key of this server" in message
        monkeypatch.setenv(KEY_VARIABLE, "secret")
        assert embed(path, "--url", server.base_url, "--out", there, *options) == 0
        assert embed(path, "--url", server.base_url, "--out", cut, *options, "--overflow", "truncate") == 0
        assert "are meant to have" not in capsys.readouterr().err
        plain, named = ["--out", tmp_path / "default", *options[2:]], ["--out", tmp_path / "named", *options[2:]]
        assert embed(path, "--url", server.base_url, *plain) == 0
        assert embed(path, "--url", server.base_url, *named, "--input-type", "sts") == 0
        assert embed(path, "--url", server.base_url, "--out", tmp_path / "24", *options, "--dimensions", "24") == 0
        assert "vectors of tiny are meant to have 16, 32, 64 dimensions, not 24" in capsys.readouterr().err
    assert embed(path, "--model", encoder, "--dtype", "float32", "--out", here, *options) == 0
    jobs = [
        json.loads((tmp_path / folder / "manifest.json").read_text())["job"] for folder in ("there", "default", "named")
    ]
    assert [job["instruction"] for job in jobs] == [INSTRUCTION, "Find:", load_prompts()["sts"].query]
    near, far = read_output(here), read_output(there)
    assert near.rows == far.rows == [0, 1, 2, 3, 4, 6, 7]
    np.testing.assert_allclose(near.vectors, far.vectors, atol=TOLERANCE)
    for found in (near, far):
        assert [(error["row"], error["line"]) for error in found.errors] == [(5, 6), (8, 9)]
        assert "maximum context length is 512 tokens" in found.errors[0]["reason"]
        assert "is empty" in found.errors[1]["reason"]
        assert not [error for error in found.errors if "index" in error["reason"]]  # of a request, which nobody saw
    assert read_output(cut).rows == [0, 1, 2, 3, 4, 5, 6, 7]


def test_another_width_is_told_or_refused(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    arguments = [path, "--model", encoder, "--dtype", "float32"]
    meant = "are meant to have 16, 32, 64 dimensions"
    for dimensions in ("16", "64"):
        assert embed(*arguments, "--out", tmp_path / dimensions, "--dimensions", dimensions) == 0
    assert meant not in capsys.readouterr().err
    assert embed(*arguments, "--out", tmp_path / "24", "--dimensions", "24") == 0
    assert f"vectors of tiny {meant}, not 24" in capsys.readouterr().err
    assert read_output(tmp_path / "24").vectors.shape == (5, 24)
    assert "widths" not in json.loads((tmp_path / "24" / "manifest.json").read_text())["job"]["source"]
    monkeypatch.setenv("LLM2VEC_OTHER_WIDTHS", "refuse")
    assert embed(*arguments, "--out", tmp_path / "none", "--dimensions", "24") == 1
    assert f"no text can be embedded so: dimensions is 24: this model's vectors {meant}" in capsys.readouterr().err


def test_empty_texts_are_as_the_settings_say(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM2VEC_EMPTY_TEXT", "bos")
    (tmp_path / "a.txt").write_text("one\n\nthree\n")
    assert embed(tmp_path / "a.txt", "--model", encoder, "--out", tmp_path / "out") == 0
    assert read_output(tmp_path / "out").rows == [0, 1, 2]


class Job:
    """The command in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LLM2VEC_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", "embed", *map(str, arguments)],
            env={**environment, "LLM2VEC_COMPILE": "off"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        with self.process as process:
            process.kill()

    def kill_once(self, folder: Path, shards: int, seconds: float) -> None:
        """SIGKILL, so long after there are so many shards."""
        end = time.monotonic() + 90
        while self.process.poll() is None and time.monotonic() < end:
            manifest = folder / "manifest.json"
            if manifest.exists() and len(json.loads(manifest.read_text())["shards"]) >= shards:
                break
            time.sleep(0.002)
        time.sleep(seconds)
        self.process.kill()
        self.wait(-signal.SIGKILL)

    def wait(self, status: int = 0) -> str:
        """What it printed, once it has ended with this status."""
        out, error = self.process.communicate(timeout=100)
        assert self.process.returncode == status, error
        return out


def test_killed_twice_it_goes_on_to_every_row_once_in_order(tmp_path: Path, encoder: Path) -> None:
    chance = random.Random()
    texts = [f"{number}: {TEXTS[number % 3]}" for number in range(6000)]
    path = write_texts(tmp_path / "a.jsonl", texts)
    out = tmp_path / "out"
    arguments = [path, "--model", encoder, "--dtype", "float32", "--out", out, "--rows-per-shard", 100]
    with Job(*arguments) as job:
        job.kill_once(out, chance.randint(0, 4), chance.uniform(0, 0.1))
    first = len(read_killed(out))
    with Job(*arguments) as job:
        job.kill_once(out, first + chance.randint(1, 8), chance.uniform(0, 0.1))
    assert first < len(read_killed(out)) < 60
    with Job(*arguments) as job:
        assert "6000 rows in 60 files" in job.wait()
    found = read_output(out)
    assert found.rows == list(range(6000))
    some = chance.sample(range(6000), 100)
    np.testing.assert_allclose(found.vectors[some], reference(encoder, [texts[n] for n in some]), atol=TOLERANCE)


def read_killed(folder: Path) -> list[dict[str, Any]]:
    """The shards that count; each is there, whole."""
    shards: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text())["shards"]
    assert all((folder / shard["file"]).stat().st_size == shard["bytes"] for shard in shards)
    return shards


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.txt", "--out", "out", "--url", "http://127.0.0.1:9"], "can't be reached .* is the server running"),
        (["a.txt", "--out", "out", "--url", "http://x", "--model", "m"], "--model is the server's own choice"),
        (["a.txt", "--out", "out", "--model", "tiny", "--device", "cuda:0,cuda:1"], "a job has one device"),
        (["a.txt", "--out", "out", "--model", "tiny", "--dimensions", "65"], "--dimensions is 65: tiny has 1 to 64"),
        (["a.txt", "--out", "out", "--rows-per-shard", "0"], "--rows-per-shard is 0: at least 1"),
        (["a.txt", "--out", "out", "--model", "tiny", "--input-type", "no"], "there is no input_type 'no': use one of"),
        (["a.txt", "--out", "out", "--input-type", "sts", "--instruction", "x"], "both say what stands before each"),
        (["here", "--out", "here/out"], "here/out is in here, whose files are to be embedded"),
        (["b.txt", "--out", "out"], "b.txt is not there"),
        (["a.txt", "--out", "out", "--model", "nowhere"], "nowhere"),
        (
            ["a.txt", "--out", "out", "--model", "tiny", "--instruction", "too long " * 600],
            "no text can be embedded so: .*context length",
        ),
    ],
)
def test_what_makes_no_sense_is_said_in_one_sentence(
    tmp_path: Path,
    encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "here").mkdir()
    (tmp_path / "tiny").symlink_to(encoder)
    assert embed(*arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("llm2vec-service: ")
    assert re.search(message, error), error
