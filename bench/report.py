"""What every benchmark says about where it ran, and how it ends: one JSON object as the last line."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("llm2vec-service", "torch", "transformers", "sentence-transformers", "tokenizers")


def machine() -> dict[str, Any]:
    """The kind of machine, the versions that matter and the commit that was measured."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
    }


def finish(name: str, result: dict[str, Any], save: bool) -> None:
    """Print the result as one line of JSON, and keep it in bench/results/ if asked to."""
    document = {"benchmark": name, "machine": machine(), **result}
    if save:
        folder = Path(__file__).parent / "results"
        (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


def _processor() -> str:
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        flags = next((line for line in lines if line.startswith("flags")), "")
        found = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
        return f"{name} ({', '.join(found)})"
    return platform.processor()


def _git(*arguments: str) -> str:
    try:
        ran = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return ""
    return ran.stdout.strip()
