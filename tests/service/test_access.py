"""Keys: which paths need one, how they are sent, kept and changed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.errors import StartupError
from service.http.access import OPEN_PATHS, Access, ApiKeys, read_keys
from service.processes.child import Assignment
from service.settings import Settings, hash_keys, load_settings
from tests.service.fakes import Server, fake_manifest, until

KEY, OTHER = "sk-one-1234567890", "sk-two-0987654321"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers", [bearer(KEY), bearer(OTHER), {"authorization": f"bearer  {KEY}"}, {"x-api-key": OTHER}, {"api-key": KEY}]
)
def test_a_valid_key_opens_the_door(headers: dict[str, str]) -> None:
    server = Server(api_keys=f"{KEY}, {OTHER}")
    with server.client:
        assert server.embed(headers, input="a").status_code == 200
        assert server.client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("sk-wrong"),
        bearer(""),
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        bearer("sha256:" + hashlib.sha256(KEY.encode()).hexdigest()),  # knowing how a key is kept is not enough
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"x-api-key": "sk-wrong"},
        {"authorization": b"Bearer \xff\xfe"},
    ],
)
def test_anything_else_is_told_so_in_the_words_of_each_api(headers: Any) -> None:
    server = Server(api_keys=KEY)
    with server.client:
        for path, body, names in (
            ("/v1/embeddings", {"input": "a"}, {"error"}),
            ("/embed", {"inputs": "a"}, {"error", "error_type"}),
            ("/v2/embed", {"texts": ["a"]}, {"message"}),
            ("/api/embed", {"input": "a", "model": "fake"}, {"error"}),
            ("/v1/chunk_embeddings", {"input": "a"}, {"error"}),
        ):
            answer = server.client.post(path, json=body, headers=headers)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"]
            assert names <= answer.json().keys(), answer.text
        error = server.client.post("/v1/embeddings", json={"input": "a"}, headers=headers).json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
        assert not server.worker.batches
        assert server.metric('llm2vec_rejected_total{reason="invalid_api_key"}') == 6


def test_only_health_and_metrics_are_open() -> None:
    server = Server(api_keys=KEY)
    with server.client:
        for path in ("/health", "/livez", "/readyz", "/ping", "/metrics"):
            assert server.client.get(path).status_code == 200, path
        for path in (
            "/docs",
            "/openapi.json",
            "/version",
            "/info",
            "/v1/models",
            "/api/tags",
            "/nonesuch",
            "/Health",
        ):
            assert server.client.get(path).status_code == 401, path
        assert server.client.get("/docs", headers=bearer(KEY)).status_code == 200
        assert server.client.get("/").status_code == 200  # a page without anything on it: see test_playground.py
        assert server.client.post("/", json={"inputs": "a"}).status_code == 401


def test_metrics_have_a_key_of_their_own() -> None:
    server = Server(api_keys=KEY, metrics_key=OTHER)
    with server.client:
        assert server.client.get("/metrics").status_code == 401
        assert server.client.get("/metrics", headers=bearer(KEY)).status_code == 401
        assert server.client.get("/metrics", headers=bearer(OTHER)).status_code == 200
        assert server.embed(bearer(OTHER), input="a").status_code == 401


def test_without_keys_everybody_may_ask() -> None:
    server = Server()
    with server.client:
        assert server.embed(bearer("anything"), input="a").status_code == 200


def test_a_caller_is_a_key_or_else_a_connection() -> None:
    here, there = ("127.0.0.1", 1), ("127.0.0.1", 2)
    access = Access(Settings(api_keys=f"{KEY}, {OTHER}"))
    one = access.caller({b"authorization": f"Bearer {KEY}".encode()}, here)
    assert 0 < one < 2**64
    assert access.caller({b"x-api-key": KEY.encode()}, there) == one
    # Only the key that opens the door counts: what is sent beside it makes nobody another caller.
    assert access.caller({b"authorization": b"Bearer sk-any", b"api-key": KEY.encode()}, here) == one
    assert access.caller({b"authorization": f"Bearer {OTHER}".encode()}, here) != one
    open_to_all = Access(Settings())
    assert open_to_all.caller({b"x-api-key": KEY.encode()}, here) == open_to_all.caller({}, here)
    assert open_to_all.caller({}, here) != open_to_all.caller({}, there)
    assert open_to_all.caller({}, None) == open_to_all.caller({}, None)  # on a Unix socket


async def test_keys_take_turns() -> None:
    server = Server(api_keys=f"{KEY}, {OTHER}", batch_tokens=20)
    worker, batcher = server.worker, server.app.state.parts.backend.batcher
    worker.gate.clear()

    def embed(key: str, text: str) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(client.post("/v1/embeddings", json={"input": text}, headers=bearer(key)))

    async with server.running() as client:
        tasks = [embed(KEY, "first")]
        await until(lambda: worker.batches)
        tasks += [embed(KEY, f"{number:04}") for number in range(40)]
        await until(lambda: batcher.queued_tokens == 200)
        tasks.append(embed(OTHER, "another"))
        await until(lambda: batcher.queued_tokens == 208)
        worker.gate.set()
        assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 42
    assert "another" in worker.batches[1]


def test_keys_are_kept_as_hashes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM2VEC_API_KEYS", f"{KEY},{OTHER}")
    monkeypatch.setenv("LLM2VEC_METRICS_KEY", OTHER)
    settings = load_settings({})
    told = Assignment(
        name="x", settings=settings, folder=Path("/x"), manifest=fake_manifest(), device_type="cpu"
    ).model_dump_json()
    for shown in (repr(settings), str(settings.model_dump()), told):
        assert KEY not in shown
        assert OTHER not in shown
    assert Assignment.model_validate_json(told).settings.api_keys == settings.api_keys == hash_keys([KEY, OTHER])
    assert ApiKeys(settings.api_keys).knows(KEY.encode())


def test_a_key_that_can_not_be_sent_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM2VEC_API_KEYS", "geheim ist groß")
    with pytest.raises(StartupError, match=r"LLM2VEC_API_KEYS: .*visible ASCII") as caught:
        load_settings({})
    assert "geheim" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_key_can_be_given_by_its_hash() -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    assert ApiKeys(hash_keys(f"sha256:{digest}")).knows(KEY.encode())


def test_a_file_of_keys_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# clients\n{KEY}  # the first\n\n")
    keys = ApiKeys(hash_keys("from-the-environment"), file)
    try:
        assert keys.knows(KEY.encode())
        assert not keys.knows(OTHER.encode())
        (tmp_path / "new").write_text(f"{OTHER}\n")
        os.replace(tmp_path / "new", file)
        keys.look()
        assert keys.knows(OTHER.encode())
        assert not keys.knows(KEY.encode())
        assert keys.knows(b"from-the-environment")
        for broken in (lambda: file.write_bytes(b"\xff geheim"), lambda: file.write_text("zwei Worte"), file.unlink):
            broken()
            keys.look()
            assert keys.knows(OTHER.encode())
        assert caplog.text.count("stay as they were") == 3
        assert "geheim" not in caplog.text
        assert "Worte" not in caplog.text
        file.write_text("")
        keys.look()
        assert not keys.knows(OTHER.encode())
    finally:
        keys.close()


def test_a_file_without_keys_refuses_to_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="LLM2VEC_API_KEYS_FILE"):
        ApiKeys((), tmp_path / "nonesuch")
    (tmp_path / "empty").write_text("# none yet\n")
    with pytest.raises(StartupError, match="no key"):
        ApiKeys((), tmp_path / "empty")
    assert read_keys(tmp_path / "empty") == ()


def test_a_key_with_a_hash_sign_is_not_cut_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# clients\n{KEY}\t# the first\nabc#def\n")
    with pytest.raises(StartupError, match="line 3 has a # inside a key") as caught:
        ApiKeys((), file)
    assert "abc" not in str(caught.value)
    assert ApiKeys(hash_keys("abc#def")).knows(b"abc#def")  # no comments there
    file.write_text(KEY)
    keys = ApiKeys((), file)
    try:
        file.write_text("abc#def\n")
        keys.look()
        assert keys.knows(KEY.encode())
        assert not keys.knows(b"abc")
        assert "line 1 has a # inside a key" in caplog.text
    finally:
        keys.close()


@pytest.mark.parametrize("variable", ["LLM2VEC_API_KEYS", "LLM2VEC_METRICS_KEY"])
@pytest.mark.parametrize("value", [" , ", " ", ","])
def test_a_variable_without_a_key_does_not_open_the_server(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StartupError, match=f"{variable}: .*there is no key in it"):
        load_settings({})


def test_keys_are_no_options_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from service.cli import main

    with pytest.raises(SystemExit):
        main(["serve", "--api-keys", KEY])
    capsys.readouterr()
    assert Settings(api_keys_file=None).api_keys == ()


def test_keys_are_never_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "llm2vec")
    server = Server(api_keys=KEY)
    with server.client:
        server.embed(bearer(KEY), input="a")
        server.embed(bearer("sk-wrong-but-secret"), input="a")
        page = server.client.get("/metrics").text
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines if line["route"] == "/v1/embeddings"] == [200, 401]
    for shown in (str(lines), page):
        assert KEY not in shown
        assert "sk-wrong" not in shown


def test_the_document_names_the_errors_that_any_request_may_get() -> None:
    server = Server()
    with server.client:
        paths = server.client.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) == (path not in OPEN_PATHS), path
            if "requestBody" in operation:
                assert {"401", "408", "413", "415", "429", "503"} <= operation["responses"].keys(), path
