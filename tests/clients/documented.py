"""The code blocks of docs/clients.md, and what running one takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tests.npm import npm_folder

_PAGE = Path(__file__).parents[2] / "docs" / "clients.md"

NODE_PACKAGE = "openai@6.49.0"


class Snippet(NamedTuple):
    """A fenced block of code: the heading that it stands under, its language and its text."""

    heading: str
    language: str
    code: str


def snippets(language: str) -> list[Snippet]:
    """The page's blocks in one language; two under one heading are told apart by number."""
    found = []
    seen: dict[str, int] = {}
    for section in re.split(r"^## ", _PAGE.read_text(), flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0].strip()
        for fence, code in re.findall(r"^```(\w+)\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL):
            if fence == language:
                seen[heading] = seen.get(heading, 0) + 1
                name = heading if seen[heading] == 1 else f"{heading} {seen[heading]}"
                found.append(Snippet(name, language, code))
    return found


def node_client() -> Path:
    """A folder into which npm has installed the openai package; skips the test where it can not be."""
    return npm_folder("clients-node", NODE_PACKAGE)
