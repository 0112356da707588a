"""What every benchmark says about where it ran, and how it ends: one JSON object as the last line.

    python -m bench.report [NAME FILE [--save]]

prints the machine, or reports the figures that a test has left in a JSON file as those of a benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
_CORES = len(os.sched_getaffinity(0))  # before a benchmark gives itself fewer
_PACKAGES = ("llm2vec-service", "torch", "transformers", "sentence-transformers", "tokenizers")


def options_of(about: str | None, model: bool = False) -> argparse.ArgumentParser:
    """A benchmark's command line, with the options that most have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model:
        parser.add_argument("--model", default="demo", help="a stored encoder or a recipe (default %(default)s)")
    parser.add_argument("--save", action="store_true", help="keep the figures in bench/results/")
    return parser


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
        "cores": _CORES,
        "python": platform.python_version(),
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
    }


def seconds_of(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The time until a call returns."""
    began = clock()
    run()
    return clock() - began


def ratio(left: Sequence[float], right: Sequence[float]) -> float:
    """The median of the rounds' own ratios, as the speed of a shared machine changes from round to round."""
    return round(median(a / b for a, b in zip(left, right, strict=True)), 3)


def tell(name: str, figures: Mapping[str, object]) -> None:
    """Print figures as a line for people."""
    print(f"{name:16}", *(f"{figure} {value}" for figure, value in figures.items()), sep="  ", flush=True)


def finish(name: str, result: dict[str, Any], save: bool) -> None:
    """Print the result as one line of JSON, and keep it in bench/results/ if asked to."""
    document = {"benchmark": name, "machine": machine(), **result}
    if save:
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
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


if __name__ == "__main__":
    if len(sys.argv) > 1:
        finish(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), "--save" in sys.argv)
    else:
        print(json.dumps(machine()))
