"""What is known so far, kept in a file: figures, checks, targets, errors; and the time that is left."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.report import machine

_Found = TypeVar("_Found")

_RESULTS = Path(__file__).parents[1] / "results"


class Report:
    """Runs steps and keeps what they find in a file."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        self.shapes: str = options.shapes
        self.compile: bool = device.type == "cuda" if options.compile is None else options.compile
        self._file = options.out / "gpu.json"
        self._ends: float = time.perf_counter() + options.seconds
        about = {"machine": about_machine(device, options.commit), "shapes": options.shapes}
        self.document: dict[str, Any] = {"benchmark": "gpu", **about, "running": ""}
        self.targets, self.checks, self.figures, self.skipped, self.errors = (
            self.document.setdefault(name, {}) for name in ("targets", "checks", "figures", "skipped", "errors")
        )

    @property
    def tiny(self) -> bool:
        """Whether this only shows that everything runs."""
        return self.shapes == "tiny"

    @property
    def seconds_left(self) -> float:
        """Until the run should end."""
        return self._ends - time.perf_counter()

    def step(self, name: str, needs_seconds: float, run: Callable[[], _Found], lacks: str = "") -> _Found | None:
        """Note what `run` gives and return it, or None if it fails, or lacks something, or its time is over."""
        if not lacks and not self.tiny and needs_seconds > self.seconds_left:
            lacks = f"about {needs_seconds:.0f} s, {self.seconds_left:.0f} are left"
        if lacks:
            self.skipped[name] = f"needs {lacks}"
            print(f"{name}: skipped, needs {lacks}", flush=True)
            self.save()
            return None
        self.document["running"] = name
        self.save()
        began, found = time.perf_counter(), None
        try:
            found = run()
            sync(self.device)
            self.figures[name] = found
        except Exception as error:
            self.errors[name] = "".join(traceback.format_exception(error))[-3000:]
        self.document["running"] = ""
        took = round(time.perf_counter() - began, 1)
        print(f"{name} ({took} s): {self.errors.get(name) or json.dumps(found)}", flush=True)
        self.save()
        gc.collect()
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # some errors leave a device that refuses everything: each step then says so
                torch.cuda.empty_cache()
        return found

    def check(self, name: str, value: float, limit: float) -> None:
        """Note whether a difference is small enough; NaN is not."""
        self.checks[name] = {"value": float(f"{value:.3g}"), "limit": limit, "ok": bool(value <= limit)}
        if not value <= limit:
            print(f"CHECK FAILED {name}: {value:.3g} > {limit}", flush=True)

    def target(self, name: str, value: float, at_least: float | None = None, at_most: float | None = None) -> None:
        """Note a figure beside what it should be."""
        met = value >= at_least if at_least is not None else at_most is not None and value <= at_most
        aim = f">= {at_least}" if at_least is not None else f"<= {at_most}"
        self.targets[name] = {"value": float(f"{value:.3g}"), "target": aim, "met": bool(met)}
        print(f"target {name}: {value:.3g}, {aim}: {'met' if met else 'MISSED'}", flush=True)

    def lacks_cuda(self) -> str:
        """What a step lacks that runs on a GPU only."""
        return "" if self.device.type == "cuda" else "CUDA"

    def lacks_compiler(self) -> str:
        """What a step lacks that compiles."""
        return "" if self.compile else "--compile"

    def save(self, and_results: bool = False) -> None:
        """Write it, and on request among the results that the repository keeps."""
        for file in (self._file, _RESULTS / "gpu.json")[: 1 + and_results]:
            file.write_text(json.dumps(self.document, indent=1) + "\n")

    @property
    def failed(self) -> bool:
        """Whether a step or a check did."""
        return bool(self.errors) or not all(check["ok"] for check in self.checks.values())


def lacks_packages(names: str) -> str:
    """Those of some packages, by the names that they are imported by, that are not installed."""
    return ", ".join(name for name in names.split() if importlib.util.find_spec(name) is None)


def about_machine(device: torch.device, commit: str) -> dict[str, Any]:
    """The machine and its device; the commit as given, where the files come without their history."""
    found = {**machine(), "cuda": torch.version.cuda, **({"commit": commit} if commit else {})}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "device_gb": round(properties.total_memory / 1e9, 1)}
    return found


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
