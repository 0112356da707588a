"""The parts that every benchmark shares: its options, turns, the machine, and one JSON object as its last line.

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
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
_CORES = len(os.sched_getaffinity(0))  # before a benchmark gives itself fewer
_PACKAGES = ("llm2vec-service", "torch", "transformers", "sentence-transformers", "tokenizers")


def options_of(about: str | None, **defaults: Any) -> argparse.Namespace:
    """A benchmark's options by name, and `--save`, which keeps its figures in bench/results/.

    A default's type is the option's. False makes a flag, a list takes several values like its first, and a tuple has
    the values to choose from, the default first.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**defaults, "save": False}.items():
        how: dict[str, Any] = {"default": default, "type": type(default), "help": "by default %(default)s"}
        if default is False:
            how = {"action": "store_true"}
        elif isinstance(default, list):
            how |= {"type": type(default[0]), "nargs": "+"}
        elif isinstance(default, tuple):
            how |= {"type": type(default[0]), "default": default[0], "choices": default}
        parser.add_argument("--" + name.replace("_", "-"), **how)
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """The kind of machine, the versions that matter and the commit that was measured."""
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
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


def by_turns(rounds: int, ways: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each way gives in each round. The ways take turns, since a shared machine's speed changes."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
            tell(name, {"round": number + 1, "gives": f"{found[name][-1]:.4g}"})
    return found


def medians(found: Mapping[str, Sequence[float]], digits: int | None = None) -> dict[str, float]:
    """The median of each way's rounds."""
    return {name: round(median(values), digits) for name, values in found.items()}


def ratio(left: Sequence[float], right: Sequence[float]) -> float:
    """The median of the rounds' own ratios."""
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
