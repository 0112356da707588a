"""The page at `/` as files: what is answered, under which headers, to whom. What it does is tried in tests/e2e."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from tests.service.fakes import Server

KEY = {"authorization": "Bearer sk-one"}
FILES = {entry.name: entry.read_text(encoding="utf-8") for entry in files("service").joinpath("playground").iterdir()}


def paths() -> list[str]:
    return ["/", *(f"/playground/{name}" for name in FILES if name != "index.html")]


def test_all_of_it_is_small() -> None:
    assert {"index.html", "app.js", "style.css"} <= FILES.keys()
    assert sum(len(text.encode()) for text in FILES.values()) < 150_000


def test_every_file_is_served_under_headers_that_hold_it_to_itself(server: Server) -> None:
    for path in paths():
        answer = server.client.get(path)
        assert answer.status_code == 200, path
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-request-id"]
    kinds = {path.rpartition(".")[2]: server.client.get(path).headers["content-type"] for path in paths()}
    assert kinds["/"] == "text/html; charset=utf-8"
    assert kinds["js"] == "text/javascript; charset=utf-8"
    assert kinds["css"] == "text/css; charset=utf-8"
    assert kinds["svg"] == "image/svg+xml"


def test_what_a_browser_has_is_not_sent_again(server: Server) -> None:
    first = server.client.get("/")
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = server.client.get("/", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert "content-security-policy" in again.headers
    assert server.client.get("/", headers={"if-none-match": '"other"'}).content == first.content
    head = server.client.head("/playground/app.js")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(FILES["app.js"].encode())


def test_the_root_still_embeds(server: Server) -> None:
    answer = server.client.post("/", json={"inputs": "a"})
    assert len(answer.json()[0]) == 8
    assert server.client.put("/").status_code == 405


@pytest.mark.parametrize("path", ["/playground", "/playground/", "/playground/nonesuch.js", "/playground/../app.py"])
def test_nothing_else_is_there(server: Server, path: str) -> None:
    assert server.client.get(path).status_code == 404


def test_the_page_needs_no_key_and_what_it_asks_for_does() -> None:
    with (server := Server(api_keys="sk-one", metrics_key="sk-two")).client:
        for path in paths():
            assert server.client.get(path).status_code == 200, path
            assert server.client.head(path).status_code == 200, path
            assert server.client.post(path, json={"inputs": "a"}).status_code == 401, path
        assert server.client.post("/", json={"inputs": "a"}, headers=KEY).status_code == 200
        for path in ("/v1/prompts", "/info", "/version", "/v1/models", "/metrics", "/playground/nonesuch.js"):
            assert server.client.get(path).status_code == 401, path


def test_it_can_be_left_out() -> None:
    with (server := Server(playground=False, api_keys="sk-one")).client:
        for path in paths():
            assert server.client.get(path).status_code == 401, path
        assert server.client.get("/", headers=KEY).status_code == 405
        assert server.client.get("/playground/app.js", headers=KEY).status_code == 404
        assert server.client.post("/", json={"inputs": "a"}, headers=KEY).status_code == 200


def test_it_is_there_before_the_model() -> None:
    server = Server()  # never started
    assert server.client.get("/").status_code == 200
    assert server.client.get("/playground/app.js").status_code == 200


def test_it_loads_nothing_from_elsewhere_and_has_nothing_inline() -> None:
    for name, text in FILES.items():
        found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r"http://www\.w3\.org/2000/svg", "", text))
        assert not found, (name, found)
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|localStorage", text
        )
    page = FILES["index.html"]
    assert re.findall(r"<script(?![^>]*\ssrc=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=", page) == []
    for source in re.findall(r'(?:src|href)="([^"#]+)"', page):
        assert source.removeprefix("playground/") in FILES, source
    for name, text in FILES.items():
        if name.endswith(".js"):
            assert {module.removeprefix("./") for module in re.findall(r'from "([^"]+)"', text)} <= FILES.keys()


def test_the_document_has_no_page_in_it(server: Server) -> None:
    """It describes the API; a page is for people."""
    described = server.client.get("/openapi.json").json()["paths"]
    assert not [path for path in described if path == "/" or path.startswith("/playground")]
