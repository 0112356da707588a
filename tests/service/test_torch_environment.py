"""What torch is told by the environment, before it is loaded."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from service.device.torch_environment import set_torch_defaults
from tests.tiny import save_base

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


# Fills 64 MB, and says in which kind of pages they are.
_MEMORY = """
import json, os, sys
from service.device.torch_environment import start_again_with_huge_pages
start_again_with_huge_pages()
memory = bytearray(b"x") * (64 << 20)
rollup = dict(line.split()[:2] for line in open("/proc/self/smaps_rollup") if "kB" in line)
json.dump([os.environ["GLIBC_TUNABLES"], sys.argv[1:], int(rollup["AnonHugePages:"])], sys.stdout)
"""


def started(**variables: str) -> tuple[str, list[str], int]:
    without = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", _MEMORY, "one", "two words"]
    done = subprocess.run(command, env=without | variables, capture_output=True, text=True, check=True)
    tunables, arguments, kilobytes = json.loads(done.stdout)
    return tunables, arguments, kilobytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="huge pages by the environment are glibc's")
def test_a_program_starts_again_with_huge_pages_unless_its_user_says_otherwise() -> None:
    tunables, arguments, kilobytes = started()
    assert (tunables, arguments) == ("glibc.malloc.hugetlb=1", ["one", "two words"])
    may = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if platform.libc_ver()[1] >= "2.35" and may.exists() and "[never]" not in may.read_text():
        assert kilobytes > 0  # all of it where the memory is not in pieces
    own = "glibc.malloc.hugetlb=0"
    assert started(GLIBC_TUNABLES=own)[0] == own


# Builds and loads an encoder, and says how many cores the threads compute on, and how many threads a product adds here.
_CORES = """
import asyncio, json, os, sys
import torch
from service.bulk.sources import LocalVectors, Wanted
from service.settings import load_settings

def threads():
    return len(os.listdir("/proc/self/task"))

async def main():
    vectors = LocalVectors.prepare(load_settings({"model": sys.argv[1], "compile": "off"}), Wanted(), lambda *_: None)
    async with vectors.running():
        on_device = vectors.prepared.backend._worker._device_thread.submit(torch.get_num_threads).result()
        before = threads()
        torch.ones(1024, 1024) @ torch.ones(1024, 1024)
        json.dump([on_device, torch.get_num_threads(), threads() - before], sys.stdout)

asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the threads of a process are counted on Linux")
def test_only_the_device_thread_computes_on_several_cores(tmp_path: Path) -> None:
    """The encoder is built in the same process, which computes too."""
    save_base(tmp_path / "base")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(f'base = "{tmp_path / "base"}"\ndtype = "float32"\n')
    variables = {"OMP_NUM_THREADS": "2", "LLM2VEC_MODELS_DIR": str(tmp_path / "models"), "LLM2VEC_DEVICE": "cpu"}
    command = [sys.executable, "-c", _CORES, str(recipe)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [2, 1, 0]
