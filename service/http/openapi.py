"""What the OpenAPI document says of endpoints that read their body and write their answer themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

Responses = dict[int | str, dict[str, Any]]

TEXT_SCHEMA: dict[str, Any] = {"type": "string"}
TOKEN_IDS_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}

# What each status of an error means.
MEANINGS = {
    400: "the request can't be served as it is; `code` and `param` say why",
    401: "no API key, or one that is not valid",
    404: "there is no such model",
    408: "the request did not arrive in time",
    413: "the body is too large",
    415: "the body is compressed",
    429: "overloaded: come again after `Retry-After` seconds",
    500: "the model gave no finite vector",
    503: "loading, draining, or out of memory",
    504: "the deadline passed in the queue",
}


def with_example(**answer: Any) -> ConfigDict:
    """The configuration of an answer's model that shows this example."""
    return ConfigDict(json_schema_extra={"example": answer})


def described(shape: type[BaseModel], meanings: Mapping[int, str] = MEANINGS) -> Responses:
    """The errors of a dialect that words them in this shape."""
    return {status: {"model": shape, "description": about} for status, about in meanings.items()}


def documented(errors: Responses, body: type[BaseModel], answer: Any, *examples: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a route: its body, its answers and examples of requests."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    for field in schema["properties"].values():
        if "description" in field:  # it may stand on several lines
            field["description"] = " ".join(field["description"].split())
    content: dict[str, Any] = {"schema": schema}
    content["examples"] = {f"example {number}": {"value": value} for number, value in enumerate(examples, 1)}
    return {
        "responses": {200: {"model": answer}, **errors},
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": content}}},
    }
