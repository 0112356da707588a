"""The encoder that real servers serve here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import build_tiny


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "tiny"
    build_tiny(folder, "gemma3_text", query_instruction="Find:", widths=[16, 32])
    return folder
