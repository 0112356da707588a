"""openai for Node, which decodes whatever it gets for its default, base64, without looking at it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.documented import node_client
from tests.clients.vectors import TEXTS, assert_same, reference
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = """
import OpenAI from "openai";
const [baseURL, ...input] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const create = async (options) =>
  (await client.embeddings.create({ model: "demo", input, ...options })).data.map((item) => Array.from(item.embedding));
const found = { usual: await create({}), float: await create({ encoding_format: "float" }) };
try {
  await client.embeddings.create({ model: "demo", input: "a", dimensions: 0 });
} catch (error) {
  found.error = { name: error.constructor.name, code: error.code, param: error.param, request: error.requestID };
}
console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def node() -> Path:
    return node_client()


def test_the_default_call_equals_the_float_call(demo: ServerProcess, node: Path) -> None:
    (node / "compare.mjs").write_text(SCRIPT)
    command = [shutil.which("node") or "node", "compare.mjs", f"{demo.base_url}/v1", *TEXTS]
    ran = subprocess.run(command, cwd=node, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    assert_same(found["usual"], found["float"])
    assert_same(found["usual"], reference(demo, TEXTS))
    assert found["error"].pop("request")
    assert found["error"] == {"name": "BadRequestError", "code": "invalid_dimensions", "param": "dimensions"}
