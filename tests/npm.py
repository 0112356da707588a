"""Packages from npm that tests use, each in a folder of its own below build/."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_BUILD = Path(__file__).parents[1] / "build"


def npm_folder(name: str, package: str) -> Path:
    """The folder into which npm has installed a package, given as name@version; skips the test where it can not be."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    folder = _BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    installed = folder / "installed.txt"
    if not installed.exists() or installed.read_text() != package:
        (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
        command = [npm, "install", "--no-fund", "--no-audit", "--no-save", "--ignore-scripts", package]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        if ran.returncode:
            pytest.skip(f"npm could not install {package}: {ran.stderr[-400:]}")
        installed.write_text(package)
    return folder
