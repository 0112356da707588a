"""A real server process with a real, tiny encoder."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.text.prompts import EncoderPrompts, load_prompts
from model_store.text.tokenizer import TextTokenizer
from service.bulk.client import served_prompts
from tests.e2e.process import ServerProcess
from tests.tiny import normalized

FLOAT32 = ("--dtype", "float32")


@pytest.fixture(scope="module")
def server(encoder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(encoder, None, *FLOAT32) as running:
        yield running


def reference(folder: Path, texts: list[str], instruction: str = "") -> NDArray[np.float32]:
    """Each text encoded alone, in this process."""
    encoder = Encoder.load(folder, device="cpu", dtype="float32")
    tokenizer = TextTokenizer.load(folder, encoder.manifest)
    rows = tokenizer.encode_batch(texts, [instruction] * len(texts))
    vectors = [normalized(encoder.encode(PackedBatch.pack([row], encoder.manifest.pooling))).numpy() for row in rows]
    return np.concatenate(vectors)


def vectors(answer: httpx.Response) -> NDArray[np.float32]:
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]], dtype=np.float32)


def test_vectors_over_http_are_the_encoder_s(server: ServerProcess, encoder: Path) -> None:
    texts = ["A plane is taking off.", "flute " * 30, "Größe 東京 🙂"]
    assert np.abs(vectors(server.embed(texts)) - reference(encoder, texts)).max() < 1e-5
    assert np.abs(vectors(server.embed(texts, input_type="query")) - reference(encoder, texts, "Find:")).max() < 1e-5
    assert np.abs(vectors(server.embed(texts)) - vectors(server.embed(texts, input_type="query"))).max() > 1e-3


def test_64_clients_at_once_get_their_own_vectors(server: ServerProcess, encoder: Path) -> None:
    texts = [f"text number {i} of a crowd, {'long ' * (i % 17)}" for i in range(128)]
    expected = reference(encoder, texts)
    with httpx.Client() as client, ThreadPoolExecutor(64) as pool:
        parts = [slice(i, i + 2) for i in range(0, 128, 2)]
        answers = list(pool.map(lambda part: server.embed(texts[part], client), parts))
    for part, answer in zip(parts, answers, strict=True):
        assert np.abs(vectors(answer) - expected[part]).max() < 1e-5
    assert server.metric("llm2vec_batch_inputs_sum") >= 128
    assert server.metric("llm2vec_queue_tokens") == 0


def test_a_client_that_hangs_up_is_noticed(server: ServerProcess) -> None:
    before = server.metric('llm2vec_cancelled_total{stage="request"}')
    dropped = server.metric('llm2vec_cancelled_total{stage="queued"}')
    waiting = 'llm2vec_queue_tokens{class="bulk"}'
    port = int(server.base_url.rpartition(":")[2])
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(server.embed, [f"{number} the river " * 20 for number in range(400)])
        server.eventually(lambda: server.metric(waiting) > 10_000)
        body = json.dumps({"input": [f"nobody waits for {number}" * 20 for number in range(400)]}).encode()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            server.eventually(lambda: server.metric('llm2vec_queue_inputs{class="bulk"}') > 400)
        assert busy.result().status_code == 200
    assert server.metric('llm2vec_cancelled_total{stage="request"}') == before + 1
    assert dropped < server.metric('llm2vec_cancelled_total{stage="queued"}') <= dropped + 400
    assert server.metric(waiting) == 0


def test_logs_are_json_with_request_ids_and_no_text(server: ServerProcess) -> None:
    secret = "the launch code is tangerine"
    answer = server.embed(secret)
    server.embed("\ud83d tangerine".encode("utf-8", "replace").decode(), instruction="tangerine", input_type="poem")
    time.sleep(0.2)
    assert not [line for line in server.lines if "tangerine" in line]
    assert all(line.startswith("{") for line in server.lines), server.lines
    assert any(record.get("request_id") == answer.headers["x-request-id"] for record in server.records())


def test_sigterm_answers_what_was_accepted_and_ends_with_0(encoder: Path) -> None:
    running = ServerProcess(encoder, None, *FLOAT32)
    with running, ThreadPoolExecutor(16) as pool:
        texts = [[f"request {i} input {j} " + "the river " * 40 for j in range(20)] for i in range(16)]
        futures = [pool.submit(running.embed, batch) for batch in texts]
        running.eventually(lambda: running.metric("llm2vec_inflight_requests") >= 10)
        assert running.stop() == 0
        answered = 0
        for batch, future in zip(texts, futures, strict=True):
            try:
                answer = future.result()
            except httpx.ConnectError:
                continue  # was never accepted
            if answer.status_code == 503:
                continue  # arrived while it was draining, and was told so
            answered += 1
            assert vectors(answer).shape == (len(batch), 64)
        assert answered >= 9


def fails_to_start(model: Path | str, environment: dict[str, str] | None = None, *options: str) -> str:
    """What a start that must not succeed says on stderr."""
    server = ServerProcess(model, environment, *options)
    assert server.process.wait(60) == 1
    server.stop()
    assert not [record for record in server.records() if record["message"] == "listening"]
    return "\n".join(server.lines)


def test_a_wrong_setting_refuses_to_start(encoder: Path) -> None:
    assert "did you mean LLM2VEC_TOKEN_BUDGET" in fails_to_start(encoder, {"LLM2VEC_TOKEN_BUGET": "1"})
    assert "raise LLM2VEC_TOKEN_BUDGET" in fails_to_start(encoder, {"LLM2VEC_TOKEN_BUDGET": "100"})
    assert "LLM2VEC_DEVICE=cpu" in fails_to_start(encoder, {"LLM2VEC_DEVICE": "cuda:77"})
    assert "there is no recipe 'nonesuch'" in fails_to_start("nonesuch")


def test_a_taken_port_refuses_to_start(encoder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "LLM2VEC_PORT" in fails_to_start(encoder, None, "--port", port)


def test_a_kernel_that_can_not_serve_ends_the_process_with_the_way_out(encoder: Path) -> None:
    server = ServerProcess(encoder, {"LLM2VEC_ATTENTION": "torch-flash", "LLM2VEC_DEVICE": "cpu"})
    assert server.process.wait(60) == 1
    server.stop()
    assert "LLM2VEC_ATTENTION=auto" in "\n".join(server.lines)


def test_a_recipe_is_built_on_the_first_start_and_found_on_the_second(tmp_path: Path) -> None:
    from tests.tiny import save_base

    save_base(tmp_path / "base")
    (tmp_path / "own.toml").write_text(f'base = "{tmp_path / "base"}"\ndtype = "float32"\n')
    options: Any = (tmp_path / "own.toml", {"LLM2VEC_MODELS_DIR": str(tmp_path / "models")})
    with ServerProcess(*options) as server:
        assert server.embed("a", model="own").status_code == 200
    built = (tmp_path / "models" / "own" / "manifest.json").stat().st_mtime_ns
    with ServerProcess(*options) as server:
        assert server.embed("a", model="own").status_code == 200
    assert (tmp_path / "models" / "own" / "manifest.json").stat().st_mtime_ns == built


def test_the_query_and_document_example(server: ServerProcess, tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "query_document.py"
    picture = tmp_path / "matrix.png"
    command = [sys.executable, str(example), "--url", server.base_url, "--picture", str(picture)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line for line in ran.stdout.splitlines() if line[:1] in "-0"]
    assert len(rows) == 2
    assert all(-1 <= float(value) <= 1 for row in rows for value in row.split()[:2])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_eval_against_the_server(server: ServerProcess, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    lines = ["score\tsentence1\tsentence2", "5\tthe same\tthe same", "2\ta river\ta valley", "0\tflute\tprotein a day"]
    pairs.write_text("\n".join(lines))
    (tmp_path / "few" / "qrels").mkdir(parents=True)
    (tmp_path / "few" / "corpus.jsonl").write_text('{"_id": "1", "text": "a river"}\n{"_id": "2", "text": "flute"}\n')
    (tmp_path / "few" / "queries.jsonl").write_text('{"_id": "3", "text": "a river"}\n')
    (tmp_path / "few" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n3\t1\t1\n")
    command = [sys.executable, "-m", "service", "eval", "--sts", str(pairs), "--retrieval", str(tmp_path / "few")]
    command += ["--json", str(tmp_path / "a.json"), "--url"]
    ran = subprocess.run([*command, server.base_url], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("STS, pairs.tsv: Spearman × 100")
    scores = json.loads((tmp_path / "a.json").read_text())["scores"]
    found = {score["metric"]: score["value"] for score in scores}
    assert found["Spearman"] >= 0.5 - 1e-9  # the pair of the same texts is sure to be the nearest
    assert found["MRR"] == 1  # and so is the query's own text
    assert served_prompts(server.base_url) == EncoderPrompts(load_prompts())  # what MTEB's tasks are asked with
    unreachable = subprocess.run([*command, "http://127.0.0.1:9"], capture_output=True, text=True)
    assert unreachable.returncode == 1
    assert "is the server running" in unreachable.stderr
