"""Stored encoders that are damaged, killed while they are built, or built twice at once: by real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_store.manifest import MANIFEST_FILE, changed_files, read_manifest
from tests.e2e.process import ServerProcess
from tests.tiny import build_tiny, save_base


def flip_a_bit_of_the_weights(store: Path) -> None:
    weights = store / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-len(content) // 2] ^= 1
    weights.write_bytes(content)


def lose_a_file(store: Path) -> None:
    (store / "tokenizer.json").unlink()


def be_of_another_version(store: Path) -> None:
    path = store / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


# And what the sentence names: what is wrong, and the way out.
DAMAGES: dict[Callable[[Path], None], tuple[str, str]] = {
    flip_a_bit_of_the_weights: ("model.safetensors: content changed", "Build it again, or copy it again"),
    lose_a_file: ("tokenizer.json: missing", "Build it again, or copy it again"),
    be_of_another_version: ("has format 99, this version reads 1", "build the encoder again"),
}


def refuse(store: Path, environment: dict[str, str]) -> str:
    """What a start that must not succeed says: one line, and none of a port that it listens on."""
    server = ServerProcess(store, environment)
    assert server.process.wait(100) == 1
    server.stop()
    (line,) = server.lines
    return line


def test_a_damaged_store_refuses_to_start(tmp_path: Path) -> None:
    build_tiny(tmp_path / "whole")
    stores = []
    for damage in DAMAGES:
        stores.append(Path(shutil.copytree(tmp_path / "whole", tmp_path / damage.__name__)))
        damage(stores[-1])
    environments = [
        {"LLM2VEC_DEVICE": "cpu", "LLM2VEC_FRONTENDS": str(1 + number % 2)} for number in range(len(stores))
    ]
    with ThreadPoolExecutor(2) as pool:
        for (wrong, way_out), said in zip(DAMAGES.values(), pool.map(refuse, stores, environments), strict=True):
            assert wrong in said
            assert way_out in said


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    (tmp_path / "own.toml").write_text(f'base = "{tmp_path / "base"}"\ndtype = "float32"\n')
    (tmp_path / "models").mkdir()
    return tmp_path / "own.toml"


def start_build(recipe: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "LLM2VEC_MODELS_DIR": str(recipe.parent / "models")}
    command = [sys.executable, "-m", "service", "build", "--recipe", str(recipe)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def is_all_that_is_there(store: Path) -> bool:
    return [path.name for path in store.parent.iterdir()] == [store.name]


def test_builds_killed_anywhere_leave_nothing_to_the_next(recipe: Path) -> None:
    """While the weights are written, and when only the rename is missing."""
    models = recipe.parent / "models"
    ends = []
    for moment in (".own-building-*/own/model.safetensors", f".own-building-*/own/{MANIFEST_FILE}"):
        build = start_build(recipe)
        while build.poll() is None and not list(models.glob(moment)):
            time.sleep(0.0005)
        build.kill()
        build.communicate()
        ends.append(build.returncode)
    assert -signal.SIGKILL in ends
    assert set(ends) <= {-signal.SIGKILL, 0}  # one may have been done before the signal came
    with ServerProcess(recipe, {"LLM2VEC_MODELS_DIR": str(models)}) as server:
        assert server.embed("a", model="own").status_code == 200
    assert is_all_that_is_there(models / "own")
    assert not changed_files(models / "own", read_manifest(models / "own"))


def test_two_processes_that_build_one_store_at_once_both_succeed(recipe: Path) -> None:
    """A command to build it, and a server that finds it missing."""
    models = recipe.parent / "models"
    build = start_build(recipe)
    with ServerProcess(recipe, {"LLM2VEC_MODELS_DIR": str(models)}) as server:
        said, _ = build.communicate()
        assert build.returncode == 0, said
        assert server.embed("a", model="own").status_code == 200
    assert is_all_that_is_there(models / "own")
    assert not changed_files(models / "own", read_manifest(models / "own"))
