"""The page at `/docs`: the OpenAPI document as HTML, for people. It loads nothing from elsewhere and runs no script."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.playground import HEADERS

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
summary { cursor: pointer; padding: .3rem 0 }
details { border-bottom: 1px solid #8886 }
table { border-collapse: collapse }
td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0 }
pre { overflow: auto; padding: .5rem; background: #8882 }
"""

_POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def show(request: Request) -> Response:
    """All endpoints of the server."""
    # In a thread: the first time it makes the document, which takes a tenth of a second.
    content = await asyncio.to_thread(lambda: write_page(request.app.openapi()))
    return Response(content, 200, {**HEADERS, "content-security-policy": _POLICY}, "text/html; charset=utf-8")


def write_page(document: Mapping[str, Any]) -> str:
    groups: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            group = groups.setdefault(operation["tags"][0], [])
            group.extend(_operation(f"{method.upper()} {path}", path, operation))
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>',
            '<meta name="viewport" content="width=device-width">',
            f"<style>{_STYLE}</style>\n<h1>{title}</h1>\n<p>{escape(info['description'])}.",
            'The same for programs: <a href="openapi.json">openapi.json</a>.</p>',
            *(line for tag, lines in groups.items() for line in (f"<h2>{escape(tag)}</h2>", *lines)),
        ]
    )


def kind(schema: Mapping[str, Any]) -> str:
    """A JSON schema's type, in words."""
    if choices := schema.get("anyOf"):
        return " or ".join(dict.fromkeys(kind(choice) for choice in choices if choice.get("type") != "null"))
    if values := schema.get("enum") or ("const" in schema and [schema["const"]]):
        return ", ".join(map(str, values))
    if "prefixItems" in schema:
        return f"[{', '.join(kind(item) for item in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        items = kind(schema.get("items", {}))
        return f"list of ({items})" if " or " in items else f"list of {items}"
    return str(schema.get("type", "any"))


def _operation(name: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    about = operation.get("description", "")
    yield f"<details><summary><code>{escape(name)}</code> {escape(about.partition(chr(10))[0])}</summary>"
    yield from (f"<p>{escape(part)}</p>" for part in about.split("\n\n")[1:])
    for content in operation.get("requestBody", {}).get("content", {}).values():
        required = content["schema"].get("required", [])
        yield "<table><tr><th>field<th>type<th>meaning</tr>"
        for field, schema in content["schema"].get("properties", {}).items():
            takes = kind(schema) + (", required" if field in required else "")
            meaning = escape(schema.get("description", ""))
            yield f"<tr><td><code>{escape(field)}</code><td>{escape(takes)}<td>{meaning}</tr>"
        yield "</table>"
        for example in content.get("examples", {}).values():
            body = json.dumps(example["value"], ensure_ascii=False, indent=2)
            yield f"<pre>POST {escape(path)}\n{escape(body)}</pre>"
    yield "<table><tr><th>status<th>meaning</tr>"
    for status, response in operation["responses"].items():
        yield f"<tr><td>{escape(status)}<td>{escape(response.get('description', ''))}</tr>"
    yield "</table></details>"
