"""What the OpenAPI document says of an endpoint that reads its body and writes its answer itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def documented(
    body: type[BaseModel], answer: Any, *examples: dict[str, Any], errors: dict[int | str, dict[str, Any]]
) -> dict[str, Any]:
    """The arguments of a route: its body, its answers and examples of requests."""
    content: dict[str, Any] = {"schema": body.model_json_schema(ref_template="#/components/schemas/{model}")}
    content["examples"] = {f"example {number}": {"value": value} for number, value in enumerate(examples, 1)}
    return {
        "responses": {200: {"model": answer}, **errors},
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": content}}},
    }
