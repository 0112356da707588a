"""Dimensions that are none of the encoder's widths: named in a header or refused, in every dialect that takes them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.service.fakes import WIDTH, Server

WIDTHS = {"widths": (2, 4, WIDTH)}

# Path → body, the field of dimensions, and the status of a refusal.
DIALECTS: dict[str, tuple[dict[str, Any], str, int]] = {
    "/v1/embeddings": ({"input": ["a", "b"]}, "dimensions", 400),
    "/openai/deployments/fake/embeddings": ({"input": "a"}, "dimensions", 400),
    "/v1/chunk_embeddings": ({"input": "abc", "chunk_size": 2}, "dimensions", 400),
    "/v1/embed": ({"texts": ["a"]}, "output_dimension", 400),
    "/v2/embed": ({"texts": ["a"], "input_type": "search_query"}, "output_dimension", 400),
    "/api/embed": ({"input": "a"}, "dimensions", 400),
    "/embed": ({"inputs": "a"}, "dimensions", 422),
    "/": ({"inputs": "a"}, "dimensions", 422),
}


@pytest.mark.parametrize("path", DIALECTS)
def test_another_width_is_named_or_refused(path: str) -> None:
    body, field, refused = DIALECTS[path]
    with (
        (warns := Server(described=WIDTHS)).client,
        (refuses := Server(described=WIDTHS, other_widths="refuse")).client,
    ):
        for right in (None, 2, 4, WIDTH):
            for server in (warns, refuses):
                answer = server.client.post(path, json={**body, field: right})
                assert answer.status_code == 200, answer.text
                assert "x-model-widths" not in answer.headers
        answer = warns.client.post(path, json={**body, field: 3})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-model-widths"] == "2, 4, 8"
        answer = refuses.client.post(path, json={**body, field: 3})
        assert answer.status_code == refused
        assert f"{field} is 3: this model's vectors are meant to have 2, 4, 8 dimensions" in answer.text


def test_the_mean_of_chunks_is_cut_and_told_like_a_vector() -> None:
    with (server := Server(described=WIDTHS)).client:
        answer = server.embed(input="x" * 600, overflow="mean", dimensions=3)
        assert len(answer.json()["data"][0]["embedding"]) == 3
        assert answer.headers["x-model-widths"] == "2, 4, 8"
        assert "x-model-widths" not in server.embed(input="x" * 600, overflow="mean", dimensions=4).headers


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed_all", {"inputs": "abc"}),
        ("/rerank", {"query": "a", "texts": ["b"]}),
        ("/api/embed", {"model": "fake"}),
        ("/api/embeddings", {"prompt": "a"}),
    ],
)
def test_answers_without_a_choice_of_dimensions_need_no_warning(path: str, body: dict[str, Any]) -> None:
    with (server := Server(described=WIDTHS, other_widths="refuse")).client:
        answer = server.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        assert "x-model-widths" not in answer.headers


@pytest.mark.parametrize("setting", ["warn", "refuse"])
def test_where_widths_are_not_known_every_one_is_right(setting: str) -> None:
    with (server := Server(other_widths=setting)).client:
        for dimensions in range(1, WIDTH + 1):
            answer = server.embed(input="a", dimensions=dimensions)
            assert answer.status_code == 200
            assert "x-model-widths" not in answer.headers


def test_the_model_names_its_widths_and_the_document_knows() -> None:
    with (server := Server(described=WIDTHS)).client:
        assert [model["widths"] for model in server.client.get("/v1/models").json()["data"]] == [[2, 4, 8]] * 3
        assert server.client.get("/v1/models/fake:query").json()["widths"] == [2, 4, 8]
        schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["ModelsAnswer"]["properties"]["data"]["items"]["$ref"].endswith("/ModelAnswer")
    assert "widths" in schemas["ModelAnswer"]["properties"]
    assert "widths" not in schemas["ModelAnswer"]["required"]
