"""The site that `make docs` makes of these pages, the README, and the server's OpenAPI document.

Pages are written for GitHub; here their links into the rest of the repository are turned, and two pages are filled:
index with the README, reference with the OpenAPI document.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from service.api.reference import kind
from tests.service.fakes import Server

project = "llm2vec-service"
html_title = "llm2vec-service"
extensions = ["myst_parser"]
myst_heading_anchors = 3
exclude_patterns = ["conf.py"]

html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

_LINK = re.compile(r"\]\(\s*(?!https?:|#)")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("include-read", read_readme)
    app.connect("source-read", read_page)


def read_readme(app: Any, path: Path, page: str, content: list[str]) -> None:
    """The README as index includes it, its links as from docs/."""
    if path.name == "README.md":
        content[0] = turned(_LINK.sub("](../", content[0]).replace("](../docs/", "]("))


def read_page(app: Any, page: str, content: list[str]) -> None:
    """A page with its links turned, and what is made for it."""
    text = turned(content[0])
    if page == "reference":
        text = text.replace("<!-- operations -->", reference())
    content[0] = text


def turned(text: str) -> str:
    """Links to the README and the changelog lead to their pages here, to other pages of the repository to the file."""
    text = text.replace("](../README.md", "](index.md").replace("](../CHANGELOG.md", "](changelog.md")
    return re.sub(r"\]\((\.\./\S+\.md\))", r"](path:\1", text)


def reference() -> str:
    """Markdown of the OpenAPI document: for each operation what it takes and which statuses it answers with."""
    paths: dict[str, Any] = Server().app.openapi()["paths"]
    groups: dict[str, list[str]] = {}
    for path, methods in paths.items():
        for method, operation in methods.items():
            groups.setdefault(operation["tags"][0], []).extend(described(f"{method.upper()} {path}", operation))
    return "\n".join(line for tag, lines in groups.items() for line in ("", f"## {tag}", *lines))


def described(name: str, operation: dict[str, Any]) -> list[str]:
    """One operation."""
    lines = ["", f"### `{name}`", "", operation.get("description", ""), ""]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        schema = content["schema"]
        required = schema.get("required", [])
        lines += ["| field | type | meaning |", "|---|---|---|"]
        for field, about in schema.get("properties", {}).items():
            needed = ", required" if field in required else ""
            lines.append(f"| `{field}` | {kind(about)}{needed} | {about.get('description', '')} |".replace("  |", " |"))
        lines.append("")
    return [*lines, f"Answers with {', '.join(sorted(operation['responses']))}."]
