"""Each code block of docs/clients.md, run against a server process; its prose and tables are not."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from tests.clients.documented import Snippet, node_client, snippets
from tests.clients.vectors import PASSAGES, QUERY, QUESTION, assert_same, reference
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DOCUMENTED = "http://localhost:8000"


def check(server: ServerProcess, query: Any, documents: Any) -> None:
    """What every block of the page must come to: the question has the query instruction, the passages have none."""
    assert_same(query, reference(server, QUESTION, instruction=QUERY), "query")
    assert_same(documents, reference(server, PASSAGES), "documents")


@pytest.mark.parametrize("snippet", snippets("python"), ids=lambda snippet: snippet.heading)
def test_python(demo: ServerProcess, snippet: Snippet) -> None:
    assert DOCUMENTED in snippet.code
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(snippet.code.replace(DOCUMENTED, demo.base_url), snippet.heading, "exec"), names)
    check(demo, names["query"], names["documents"])


@pytest.mark.parametrize("snippet", snippets("js"), ids=lambda snippet: snippet.heading)
def test_node(demo: ServerProcess, snippet: Snippet) -> None:
    folder = node_client()
    code = snippet.code.replace(DOCUMENTED, demo.base_url) + "\nconsole.log(JSON.stringify({ query, documents }));\n"
    (folder / "documented.mjs").write_text(code)
    command = [shutil.which("node") or "node", "documented.mjs"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    check(demo, **json.loads(ran.stdout.splitlines()[-1]))


def test_curl(demo: ServerProcess) -> None:
    (snippet,) = snippets("sh")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["bash", "-c", snippet.code.replace(DOCUMENTED, demo.base_url)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    vectors = [item["embedding"] for item in json.loads(ran.stdout)["data"]]
    assert_same(vectors, reference(demo, QUESTION, instruction=QUERY))


def test_the_page_has_a_block_for_every_client() -> None:
    headings = {snippet.heading.partition(" 2")[0] for snippet in [*snippets("python"), *snippets("js")]}
    assert len(headings) >= 11, headings
