"""The servers that the client packages talk to, and an environment in which those packages stay offline."""

from __future__ import annotations

import gc
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.vectors import SEPARATOR
from tests.e2e.process import ServerProcess
from tests.tiny import build_tiny

SETTINGS = {
    "LLM2VEC_EMPTY_TEXT": "bos",
    "LLM2VEC_INSTRUCTION_SEPARATOR": SEPARATOR,
    "LLM2VEC_MODEL_ALIASES": json.dumps({"questions": "query"}),
}

# Connections that the packages leave open, and what they call of pydantic; to be seen only where they are to blame.
NOT_OURS = [
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pydantic.warnings.PydanticDeprecatedSince20",
    "ignore::pydantic.warnings.PydanticDeprecatedSince211",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(*NOT_OURS))


@pytest.fixture(scope="package", autouse=True)
def _clients() -> None:
    pytest.importorskip("openai", reason="the client packages are in the extra `clients`")


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    """What a module's tests leave open is closed while its warnings are still let pass."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No telemetry, no price lists, and tiktoken's vocabulary from the package that ships it."""
    litellm = importlib.util.find_spec("litellm")
    assert litellm
    assert litellm.origin
    vocabularies = Path(litellm.origin).parent / "litellm_core_utils" / "tokenizers"
    assert (vocabularies / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").is_file(), "cl100k_base, as tiktoken names it"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabularies))
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    monkeypatch.setenv("NVIDIA_USAGE_TELEMETRY_ENABLED", "false")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # it refuses this machine, too


@pytest.fixture(scope="package")
def demo(demo_encoder: Path) -> Iterator[ServerProcess]:
    """The packaged real model; it says `query` with the instruction `vectors.QUERY`."""
    with ServerProcess(demo_encoder, SETTINGS) as running:
        yield running


@pytest.fixture(scope="package")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "tiny"
    build_tiny(folder, "gemma3_text", query_instruction="Find:")
    return folder


@pytest.fixture(scope="package")
def tiny(tiny_model: Path) -> Iterator[ServerProcess]:
    """A model of a few thousand parameters, for many texts and many requests; it takes any model's name."""
    settings = {"LLM2VEC_EMPTY_TEXT": "bos", "LLM2VEC_ANY_MODEL": "true"}
    with ServerProcess(tiny_model, settings, "--dtype", "float32") as running:
        yield running
