"""Pages of other origins: none by default, and never with credentials."""

from __future__ import annotations

import pytest

from service.errors import StartupError
from service.http.headers import ANSWER_HEADERS
from service.settings import load_settings
from tests.service.fakes import Server

PAGE = "https://app.example.org"


def preflight(server: Server, origin: str = PAGE, method: str = "POST") -> dict[str, str]:
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    return dict(server.client.options("/v1/embeddings", headers=headers).headers)


def test_none_by_default() -> None:
    server = Server()
    with server.client:
        answer = server.embed({"origin": PAGE}, input="a")
        assert not [name for name in (*answer.headers, *preflight(server)) if name.startswith("access-control")]


def test_a_listed_origin_may_ask_and_read_headers_and_errors() -> None:
    server = Server(cors_origins=f"{PAGE},http://localhost:3000", api_keys="k")
    with server.client:
        before = preflight(server)  # which has no key
        assert before["access-control-allow-origin"] == PAGE
        assert "x-stainless-lang" in before["access-control-allow-headers"]
        assert "Origin" in before["vary"]
        answer = server.embed({"origin": PAGE, "x-api-key": "k"}, input="a")
        assert answer.headers["access-control-allow-origin"] == PAGE
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert {*ANSWER_HEADERS, "retry-after"} <= set(exposed)
        refused = server.embed({"origin": PAGE}, input="a")
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == PAGE


def test_another_origin_gets_nothing_and_caches_are_told() -> None:
    server = Server(cors_origins=PAGE)
    with server.client:
        for headers in ({"origin": "https://evil.example"}, {"origin": f"{PAGE}.evil.example"}, {"origin": "null"}, {}):
            answer = server.client.get("/v1/models", headers=headers)
            assert "access-control-allow-origin" not in answer.headers
            assert answer.headers["vary"] == "Origin"
        assert "access-control-allow-origin" not in preflight(server, "https://evil.example")
        assert "DELETE" not in preflight(server, method="DELETE").get("access-control-allow-methods", "")


def test_every_origin_is_without_credentials() -> None:
    server = Server(cors_origins="*")
    with server.client:
        for headers in (server.embed({"origin": PAGE, "cookie": "a=b"}, input="a").headers, preflight(server)):
            assert headers["access-control-allow-origin"] in ("*", PAGE)
            assert "access-control-allow-credentials" not in headers


def test_allowed_origins_may_ask_a_server_in_a_private_network() -> None:
    for origins, origin, leave in ((PAGE, PAGE, "true"), ("*", PAGE, "true"), (PAGE, "https://evil.example", None)):
        with (server := Server(cors_origins=origins)).client:
            headers = {
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-private-network": "true",
            }
            answer = server.client.options("/v1/embeddings", headers=headers)
            assert answer.status_code == (200 if leave else 400), answer.text
            assert answer.headers.get("access-control-allow-private-network") == leave
    with (server := Server(cors_origins=PAGE)).client:
        assert "access-control-allow-private-network" not in preflight(server)  # which nobody asked for


@pytest.mark.parametrize("wrong", ["app.example.org", "https://app.example.org/", "null", "https://*.example.org"])
def test_what_is_no_origin_refuses_to_start(wrong: str) -> None:
    with pytest.raises(StartupError, match="LLM2VEC_CORS_ORIGINS"):
        load_settings({"cors_origins": wrong})
