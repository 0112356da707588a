"""Exported encoders opened by sentence-transformers with its own modules: the stored encoder's vectors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model_store.build.build import build_encoder
from model_store.build.export import ExportError, export_encoder
from model_store.manifest import StoreError
from model_store.recipe import recipe_from
from model_store.templates import Template
from service.cli import main
from tests.model_store.test_description import ROWS, TEXTS, ours, publish, theirs
from tests.tiny import build_tiny

pytest.importorskip("sentence_transformers", reason="sentence-transformers is in the extra `dev`")

# Opened in a process of its own, in which this package can't be imported.
_OPEN = """
import json, sys
sys.modules["model_store"] = sys.modules["service"] = None
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", model_kwargs={"dtype": "float32"})
json.dump([model.encode(json.loads(sys.argv[2]), prompt_name=name).tolist() for name in (None, "query")], sys.stdout)
"""


@pytest.mark.parametrize("row", ["qwen3, causal, last token", "gemma3, bidirectional by its own flag, two layers"])
def test_what_sentence_transformers_described_goes_back_to_it(tmp_path: Path, row: str) -> None:
    published = publish(tmp_path, *ROWS[row])
    manifest = build_encoder(recipe_from("encoder", base=str(published), dtype="float32"), tmp_path / "encoder")
    assert main(["export", str(tmp_path / "encoder"), "--out", str(tmp_path / "out")]) == 0
    assert np.abs(theirs(tmp_path / "out") - ours(tmp_path / "encoder")).max() < 1e-5
    for role, asked in (("query", manifest.query_instruction), ("document", manifest.document_instruction)):
        by_role = theirs(tmp_path / "out", prompt_name=role)
        assert np.abs(by_role - ours(tmp_path / "encoder", asked)).max() < 1e-5


def test_llm2vec_with_the_last_token_opens_without_this_package(tmp_path: Path) -> None:
    build_tiny(tmp_path / "encoder", "llama", pooling="last_token", query_instruction="Find:")
    export_encoder(tmp_path / "encoder", tmp_path / "out")
    command = [sys.executable, "-c", _OPEN, str(tmp_path / "out"), json.dumps(TEXTS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    plain, query = (np.array(vectors) for vectors in json.loads(done.stdout.splitlines()[-1]))
    assert np.abs(plain - ours(tmp_path / "encoder")).max() < 1e-5
    assert np.abs(query - ours(tmp_path / "encoder", "Find:")).max() < 1e-5


def test_what_stock_modules_can_not_be_is_refused(tmp_path: Path) -> None:
    build_tiny(tmp_path / "mean", "llama")
    with pytest.raises(ExportError, match=r"can't be mean: it leaves instructions out of pooling, and the special tok"):
        export_encoder(tmp_path / "mean", tmp_path / "out")
    build_tiny(tmp_path / "inst", "llama", pooling="last_token", template=Template("[INST] ", " [/INST]", strip=True))
    with pytest.raises(ExportError, match=r"it puts '\[INST\] ' before each text and ' \[/INST\]' after it"):
        export_encoder(tmp_path / "inst", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(StoreError, match="is not a stored encoder"):
        export_encoder(tmp_path / "mean-base", tmp_path / "out")
    build_tiny(tmp_path / "whole", "llama", skip_instruction=False)
    with pytest.raises(ExportError, match="not empty: choose another place"):
        export_encoder(tmp_path / "whole", tmp_path / "mean")
