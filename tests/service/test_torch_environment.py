"""What torch is told by the environment, before it is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.device.torch_environment import set_torch_defaults

NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def told(monkeypatch: pytest.MonkeyPatch, folder: Path, engines: int, **already: str) -> dict[str, str]:
    with monkeypatch.context() as patch:
        for name in NAMES:
            patch.setenv(name, "")  # so that it is put back afterwards
            patch.delenv(name)
        for name, value in already.items():
            patch.setenv(name, value)
        set_torch_defaults(folder, engines)
        return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    found = told(monkeypatch, tmp_path, 1)
    assert found == {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled"),
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    assert told(monkeypatch, tmp_path, 32)["TORCHINDUCTOR_COMPILE_THREADS"] == "2"


def test_few_cores_are_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert told(monkeypatch, tmp_path, 8)["TORCHINDUCTOR_COMPILE_THREADS"] == "1"


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = {"TORCHINDUCTOR_CACHE_DIR": "/elsewhere", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    found = told(monkeypatch, tmp_path, 1, **own)
    assert own.items() <= found.items()
    assert "PYTORCH_ALLOC_CONF" not in found
